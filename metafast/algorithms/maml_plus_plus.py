"""MAML++."""

from __future__ import annotations

from typing import Any, Unpack

from torch import nn

from metafast.algorithms.learner import Options
from metafast.algorithms.maml import MAML
from metafast.engine.learned_rates import learning
from metafast.engine.task_batch import LossFn, check_count
from metafast.inner import Rule


class MAMLPlusPlus(MAML):
    """MAML++ (Antoniou, Edwards and Storkey, "How to train your MAML", ICLR 2019, section 4).

    MAML with

    - multi-step loss (MSL): Σ_k v_k L_i(θ_i,k) over the parameters after each step (equation 4). Over the first
      ``multi_step_epochs`` epochs the weights move from equal ones towards the last step's, as in the authors' code;
      after them only the last step counts;
    - derivative-order annealing (DA): first order for ``first_order_epochs`` epochs, then second;
    - learned rates per layer and step (LSLR), in ``rates``.

    Call :meth:`next_epoch` after each epoch. ``state_dict()`` carries its number. The paper's batch-norm statistics per step
    belong to the model, and its cosine schedule to the outer optimizer.

    Args:
        model, loss_fn, inner, steps, options: as for :class:`metafast.MAML`. Where ``inner.learn`` names ``lr``, that
            granularity is used.
        multi_step_epochs: epochs of the multi-step loss, at least 0; with 0 the last step alone counts from the start.
        first_order_epochs: epochs of first order, at least 0.

    Attributes:
        epoch: number of the current epoch, from 0.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        inner: Rule,
        steps: int = 5,
        multi_step_epochs: int = 15,
        first_order_epochs: int = 50,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, loss_fn, inner=learning(inner, "lr", "tensor_step"), steps=steps, **options)
        self.multi_step_epochs = check_count("multi_step_epochs", multi_step_epochs)
        self.first_order_epochs = check_count("first_order_epochs", first_order_epochs)
        self._set_epoch(0)

    def next_epoch(self) -> None:
        """Goes on to the next epoch: its order and its weights of the steps."""
        self._set_epoch(self.epoch + 1)

    def get_extra_state(self) -> dict[str, int]:
        """The number of the epoch, for ``state_dict()``."""
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Sets the epoch that the state names."""
        self._set_epoch(state["epoch"])

    def _set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order = 1 if epoch < self.first_order_epochs else 2
        annealing = self.steps > 0 and epoch < self.multi_step_epochs
        self.step_weights = annealed_weights(self.steps, epoch, self.multi_step_epochs) if annealing else None


def annealed_weights(steps: int, epoch: int, epochs: int) -> list[float]:
    """The weights of the multi-step loss: 1/K each, of which all but the last fall linearly to at least 0.03/K."""
    least = 0.03 / steps
    early = max(1 / steps - epoch / (steps * epochs), least)
    return [early] * (steps - 1) + [1 - (steps - 1) * early]
