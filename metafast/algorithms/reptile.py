"""Reptile."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from metafast.algorithms.learner import MetaLearner, Options
from metafast.engine.precomputed_gradients import with_precomputed_gradients
from metafast.engine.step import TaskResults
from metafast.engine.task_batch import LossFn
from metafast.inner import Rule


class Reptile(MetaLearner):
    """Reptile (Nichol, Achiam and Schulman, arXiv 1803.02999, algorithm 2), all tasks side by side.

    ``backward()`` leaves θ − mean_i θ_i' as the gradient (section 3 of the paper calls it the Reptile gradient), so that
    ``torch.optim.SGD(lr=ε)`` is the paper's own outer step θ ← θ + ε mean_i (θ_i' − θ), and any other optimizer works.

    Args:
        model, loss_fn, inner, steps, options: as for :class:`metafast.MetaLearner`. Only adapted parameters get a gradient.
            Rates are not learned.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, *, inner: Rule, steps: int = 1, **options: Unpack[Options]
    ) -> None:
        if isinstance(inner, Rule) and inner.learn:
            raise ValueError(f"inner: Reptile has no gradient for rates; expected none in learn, got {inner.learned}")
        super().__init__(model, loss_fn, inner=inner, steps=steps, order=1, **options)

    def forward(self, support: Any, query: Any = None, task_weights: Tensor | None = None) -> Tensor:
        """The query loss after adaptation, or without ``query`` the support loss at the last inner step, over tasks.

        The gradient is Reptile's in both cases: nothing is learned from the query set.
        """
        return super().forward(support, query, task_weights)

    def task_results(self, support: Any, query: Any, tasks: int) -> TaskResults:
        """The query or support losses, with Reptile's gradient."""
        start = self.start(support)
        with torch.no_grad():
            adapted = self.inner_loop(start, order=1).run(start, support, tasks, self.steps)
            losses, metrics = (
                (None, {}) if query is None else self.task_losses.compute(adapted.params, start.shared, query)
            )
        values = losses
        if values is None:
            values = adapted.losses[-1] if self.steps else torch.zeros(tasks, device=self.device)
        gradients = [start.params[name].detach() - adapted.params[name].detach() for name in start.params]
        values = with_precomputed_gradients(values, gradients, list(start.params.values()))
        return TaskResults(values, adapted.losses, losses, metrics)
