"""Meta-SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import nn

from metafast.algorithms.learner import Options
from metafast.algorithms.maml import MAML
from metafast.engine.learned_rates import learning
from metafast.engine.task_batch import LossFn
from metafast.inner import Rule


class MetaSGD(MAML):
    """Meta-SGD (Li, Zhou, Chen and Li, arXiv 1707.09835, algorithm 1): MAML that also learns α, a rate per parameter.

    The inner step is θ_i' = θ − α ∘ ∇L_i(θ) (equation 2 of the paper), and the meta-gradient is that of
    mean_i L_i(θ_i') by θ and by α (equation 3). α is in ``rates``; the paper starts it at random numbers in [0.005, 0.1]::

        for alpha in meta.rates.parameters():
            torch.nn.init.uniform_(alpha, 0.005, 0.1)

    Args:
        model, loss_fn, steps, order, step_weights, options: as for :class:`metafast.MAML`. The paper takes one step.
        inner: as for MAML; α starts at its ``lr``. Where ``inner.learn`` names ``lr``, that granularity is used, for example
            "parameter_step".
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        inner: Rule,
        steps: int = 1,
        order: int = 2,
        step_weights: Sequence[float] | None = None,
        **options: Unpack[Options],
    ) -> None:
        inner = learning(inner, "lr", "parameter")
        super().__init__(model, loss_fn, inner=inner, steps=steps, order=order, step_weights=step_weights, **options)
