"""Reptile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from metafast.inner import Rule
from metafast.meta.base import MetaLearner, count_query_tasks
from metafast.meta.tasks import LossFn, count_tasks


class Reptile(MetaLearner):
    """Reptile (Nichol, Achiam and Schulman, arXiv 1803.02999, algorithm 2), all tasks side by side.

    ``backward()`` leaves θ − mean_i θ_i' as the gradient (section 3 of the paper calls it the Reptile gradient), so that
    ``torch.optim.SGD(lr=ε)`` is the paper's own outer step θ ← θ + ε mean_i (θ_i' − θ), and any other optimizer works.

    Args:
        model, loss_fn, inner, steps, task_batching: as for :class:`metafast.MAML`.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, *, inner: Rule, steps: int = 1, task_batching: str = "auto"
    ) -> None:
        super().__init__(model, loss_fn, inner=inner, steps=steps, order=1, task_batching=task_batching)

    def forward(self, support: Any, query: Any = None) -> Tensor:
        """The mean query loss after adaptation, or without ``query`` the mean support loss at the last inner step.

        Either way the gradient is Reptile's: a query set is looked at, not learned from.
        """
        tasks = count_tasks(support, "support")
        if query is not None:
            count_query_tasks(query, tasks)
        params = self._adapted_params()
        with torch.no_grad():
            adapted = self._adapt(support, tasks)
            losses, metrics = (None, {}) if query is None else self._losses(adapted.params, query)
        self._record(adapted.losses, losses, metrics)
        value = adapted.losses[-1] if losses is None and self.steps else losses
        gradients = [params[name].detach() - adapted.params[name].detach().mean(0) for name in params]
        return _WithGradients.apply(torch.zeros(()) if value is None else value.mean(), gradients, *params.values())


class _WithGradients(Function):
    """A value whose gradients by ``params`` are given numbers."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(grad * gradient for gradient in ctx.gradients))
