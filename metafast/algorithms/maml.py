"""Model-agnostic meta-learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from metafast.algorithms.learner import MetaLearner, Options
from metafast.engine.embedding_rows import TaskParams
from metafast.engine.inner_loop import InnerLoop, Start
from metafast.engine.step import TaskResults
from metafast.engine.task_batch import LossFn, Params
from metafast.inner import Rule


class MAML(MetaLearner):
    """MAML (Finn, Abbeel and Levine, ICML 2017, algorithm 1), all tasks side by side.

    ``meta(support, query)`` is mean_i L_i(θ_i') with θ_i' from ``steps`` steps of ``inner`` on task i's support set
    (equation 1 of the paper for one step). Its ``backward()`` leaves the meta-gradient in ``model.parameters()``: exact
    for ``order=2``; for ``order=1`` the first-order approximation FOMAML (section 5.2), which takes the inner gradients
    as constants.

    Args:
        model, loss_fn, inner, steps, order, options: as for :class:`metafast.MetaLearner`.
        step_weights: ``steps`` numbers w_k for the multi-step loss Σ_k w_k L_i(θ_i,k+1) of MAML++ (Antoniou, Edwards and
            Storkey, ICLR 2019, section 4), where L_i(θ_i,k+1) is the query loss after step k; None: the query loss after
            the last step alone.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        FloatingPointError: from a call, when a loss is not finite; the message names task and step.
    """

    adapts_rows = True

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
        super().__init__(model, loss_fn, inner=inner, steps=steps, order=order, **options)
        if step_weights is not None and not isinstance(step_weights, Sequence):
            raise TypeError(f"step_weights: expected {steps} numbers, one per step, got {type(step_weights).__name__}")
        if step_weights is not None and len(step_weights) != steps:
            raise ValueError(f"step_weights: expected {steps} numbers, one per step, got {len(step_weights)}")
        self.step_weights = None if step_weights is None else [float(weight) for weight in step_weights]

    def task_results(self, support: Any, query: Any, tasks: int) -> TaskResults:
        """The query losses after the inner loop, or with ``step_weights`` their weighted sum over the steps."""
        start = self.start(support)
        loop = self.training_loop(start, support, tasks)
        if self.step_weights is None or self.steps == 0:
            adapted = loop.run(start, support, tasks, self.steps)
            losses, metrics = self.task_losses.compute(adapted.params, start.shared, query)
            return TaskResults(losses, adapted.losses, losses, metrics)
        return self._multi_step(loop, start, support, query, tasks, self.step_weights)

    def _multi_step(
        self, loop: InnerLoop, start: Start, support: Any, query: Any, tasks: int, weights: Sequence[float]
    ) -> TaskResults:
        def query_losses(inputs: tuple[TaskParams, Params], create_graph: bool) -> Tensor:
            return self.task_losses.compute(*inputs, query)[0]

        weighted, support_losses = [], []
        losses, metrics = torch.empty(0), dict[str, Tensor]()
        steps = loop.steps(start, support, tasks, self.steps)
        for number, ((params, step_losses), weight) in enumerate(zip(steps, weights, strict=True)):
            support_losses.append(step_losses)
            if number == self.steps - 1:
                losses, metrics = self.task_losses.compute(params, start.shared, query)
                weighted.append(weight * losses)
            elif weight != 0:
                # The graphs of these losses are kept or rebuilt as those of the steps are.
                weighted.append(weight * loop.differentiable(query_losses, (params, start.shared), number))
        return TaskResults(torch.stack(weighted).sum(0), torch.stack(support_losses), losses, metrics)
