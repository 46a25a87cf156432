"""What every meta-learning algorithm has: a model, a loss, an inner loop, and adaptation without a graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafast.inner import Rule
from metafast.meta.inner_loop import Adapted, InnerLoop
from metafast.meta.tasks import Learners, LossFn, Params, TaskLosses, count_tasks


class Outcome(NamedTuple):
    """What a call saw, without a graph: ``support_losses [K, T]``, ``query_losses [T]`` or None, ``metrics [T, ...]``."""

    support_losses: Tensor
    query_losses: Tensor | None
    metrics: dict[str, Tensor]


class MetaLearner(nn.Module):
    """Base of the algorithms. Parameters that do not require a gradient are shared by all tasks and never adapted.

    Attributes:
        outcome: the :class:`Outcome` of the latest call.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        inner: Rule,
        steps: int,
        order: int,
        checkpoint: bool = False,
        task_batching: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a callable loss_fn(model, batch), got {type(loss_fn).__name__}")
        if not isinstance(inner, Rule):
            raise TypeError(f"inner: expected a rule of metafast.inner, got {type(inner).__name__}")
        if order not in (1, 2):
            raise ValueError(f"order: expected 1 or 2, got {order!r}")
        _check_steps(steps)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model: expected parameters that require a gradient, got none to adapt")
        self.model = model
        self.loss_fn = loss_fn
        self.inner = inner
        self.steps = steps
        self.order = order
        # Not a submodule of this one: it holds the model again, under other names.
        self._losses = TaskLosses(model, loss_fn, task_batching)
        self._inner_loop = InnerLoop(self._losses, inner, order, checkpoint)
        self.outcome: Outcome | None = None

    def adapt(self, support: Any, steps: int | None = None) -> Learners:
        """Every task's model after ``steps`` inner steps (None: as many as in training; 0: unadapted), without a graph.

        Args:
            support: pytree of tensors whose first dimension is the task.
        """
        tasks = count_tasks(support, "support")
        steps = self.steps if steps is None else _check_steps(steps)
        with torch.no_grad():
            loop = InnerLoop(self._losses, self.inner, order=1)
            params = {name: p.detach() for name, p in self._adapted_params().items()}
            adapted = loop(params, support, tasks, steps)
        _check_finite(adapted.losses, None)
        return Learners(self.model, adapted.params)

    def _adapted_params(self) -> Params:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _adapt(self, support: Any, tasks: int) -> Adapted:
        return self._inner_loop(self._adapted_params(), support, tasks, self.steps)

    def _record(self, support_losses: Tensor, query_losses: Tensor | None, metrics: dict[str, Tensor]) -> None:
        self.outcome = Outcome(
            support_losses,
            None if query_losses is None else query_losses.detach(),
            {name: metric.detach() for name, metric in metrics.items()},
        )
        _check_finite(support_losses, query_losses)


def count_query_tasks(query: Any, tasks: int) -> None:
    """Raises ValueError where query has another number of tasks than support."""
    found = count_tasks(query, "query")
    if found != tasks:
        raise ValueError(f"query: expected {tasks} tasks, as many as in support, got {found}")


def _check_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    return steps


def _check_finite(support_losses: Tensor, query_losses: Tensor | None) -> None:
    """One look after the whole inner loop, so that a GPU is waited for once; a loss that left the finite stays out."""
    finite = torch.isfinite(support_losses).all()
    if query_losses is not None:
        finite = finite & torch.isfinite(query_losses).all()
    if finite:
        return
    bad = (~torch.isfinite(support_losses)).nonzero()
    if len(bad):
        step, task = bad[0].tolist()
        found, where = support_losses[step, task].item(), f"task {task} at inner step {step}"
        raise FloatingPointError(f"support loss: expected finite values, got {found} in {where}")
    assert query_losses is not None
    task = int((~torch.isfinite(query_losses)).nonzero()[0])
    found = query_losses[task].item()
    raise FloatingPointError(
        f"query loss: expected finite values, got {found} in task {task} after the last inner step"
    )
