"""Model-agnostic meta-learning."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metafast.inner import Rule
from metafast.meta.base import MetaLearner, count_query_tasks
from metafast.meta.tasks import LossFn, count_tasks


class MAML(MetaLearner):
    """MAML (Finn, Abbeel and Levine, ICML 2017, algorithm 1), all tasks side by side.

    ``meta(support, query)`` is mean_i L_i(θ_i') with θ_i' from ``steps`` steps of ``inner`` on task i's support set
    (equation 1 of the paper for one step). Its ``backward()`` leaves the meta-gradient in ``model.parameters()``: exact
    for ``order=2``; for ``order=1`` the first-order approximation FOMAML (section 5.2), which takes the inner gradients
    as constants.

    Args:
        model: any module; it runs inside :func:`metafast.accelerate`.
        loss_fn: ``loss_fn(model, batch)`` gives the scalar mean loss of one task, or that and a dict of metrics. It runs
            under ``vmap`` where it can: ``batch`` comes without the task dimension.
        inner: update rule of the inner loop, such as ``metafast.inner.SGD(lr=0.1)``.
        steps: inner steps K.
        order: 1 or 2.
        checkpoint: for ``order=2``, rebuild each inner step's graph in the backward pass instead of keeping all: the
            memory of one step for about a third more arithmetic; the same gradient.
        task_batching: ``"vmap"``, ``"loop"`` (one task after another) or ``"auto"`` (vmap unless the model does not run
            under it; the reason is logged).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        FloatingPointError: from a call, when a loss is not finite; the message names task and step.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        inner: Rule,
        steps: int = 1,
        order: int = 2,
        checkpoint: bool = False,
        task_batching: str = "auto",
    ) -> None:
        super().__init__(
            model, loss_fn, inner=inner, steps=steps, order=order, checkpoint=checkpoint, task_batching=task_batching
        )

    def forward(self, support: Any, query: Any) -> Tensor:
        """The mean query loss after adaptation.

        Args:
            support, query: pytrees of tensors whose first dimension is the task, the same number of tasks in both.
        """
        tasks = count_tasks(support, "support")
        count_query_tasks(query, tasks)
        adapted = self._adapt(support, tasks)
        losses, metrics = self._losses(adapted.params, query)
        self._record(adapted.losses, losses, metrics)
        return losses.mean()
