"""Means and 95 % intervals over tasks, per number of steps of adaptation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metafast.algorithms.learner import MetaLearner
from metafast.arguments import check_positive
from metafast.tasks.source import Tasks

__all__ = ["Evaluation", "Interval", "evaluate"]


@dataclass(frozen=True)
class Interval:
    """A mean over tasks, and half of the 95 % interval of that mean (normal approximation)."""

    mean: float
    half_width: float
    tasks: int

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """The interval of values ``[tasks]``; of one task it is not known (NaN)."""
        spread = values.double().std().item() if len(values) > 1 else math.nan
        return cls(values.double().mean().item(), 1.96 * spread / math.sqrt(len(values)), len(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


@dataclass(frozen=True)
class Evaluation:
    """Query losses and metrics of every task.

    Args:
        values: ``values[name][steps]`` is float64 ``[tasks]``, with ``"loss"`` among the names.
    """

    values: Mapping[str, Mapping[int, Tensor]]

    def interval(self, name: str = "accuracy", steps: int | None = None) -> Interval:
        """Mean and interval over the tasks.

        Args:
            name: ``"loss"`` or a metric of the learner's ``loss_fn``.
            steps: steps of adaptation; None: the most that were evaluated.

        Raises:
            ValueError: there is no such metric or number of steps.
        """
        if name not in self.values:
            raise ValueError(f"name: expected one of {', '.join(self.values)}, got {name!r}")
        by_steps = self.values[name]
        chosen = max(by_steps) if steps is None else steps
        if chosen not in by_steps:
            raise ValueError(f"steps: expected one of {', '.join(map(str, by_steps))}, got {steps}")
        return Interval.of(by_steps[chosen])

    def to_json(self) -> dict[str, Any]:
        """Means and half widths by metric and number of steps."""
        found = {name: {steps: Interval.of(values) for steps, values in by.items()} for name, by in self.values.items()}
        return {
            name: {
                str(steps): {"mean": of.mean, "half_width": of.half_width, "tasks": of.tasks}
                for steps, of in by.items()
            }
            for name, by in found.items()
        }


def evaluate(
    meta: MetaLearner,
    tasks: Tasks,
    episodes: int = 600,
    *,
    steps: Sequence[int] | None = None,
    tasks_per_batch: int = 20,
    workers: int = 0,
) -> Evaluation:
    """Adapts to the first ``episodes`` of ``tasks`` and measures their query sets. The learner is as before afterwards.

    It runs in evaluation mode, without ``capture``, and draws no random number of torch's global generators.

    Args:
        meta: any learner whose model is not sharded.
        tasks: a source of tasks of classes that were held out.
        episodes: how many tasks; the same ones at each call.
        steps: numbers of inner steps after which to measure; None: 0 and as many as in training.
        tasks_per_batch: tasks that are adapted side by side.
        workers: processes that draw episodes ahead.

    Raises:
        ValueError: a number is out of range.
        FloatingPointError: a support loss is not finite.
    """
    check_positive("episodes", episodes)
    chosen = sorted({0, meta.steps} if steps is None else set(steps))
    if not chosen or chosen[0] < 0:
        raise ValueError(f"steps: expected numbers of at least 0, got {steps}")
    values: dict[str, dict[int, list[Tensor]]] = {}
    with evaluating(meta):
        for support, query in tasks.batches(tasks_per_batch, stop=episodes, workers=workers):
            support, query = on_device((support, query), meta.device)
            for count in chosen:
                for name, found in _measured(meta, support, query, count).items():
                    values.setdefault(name, {}).setdefault(count, []).append(found)
    return Evaluation({name: {k: torch.cat(found) for k, found in by.items()} for name, by in values.items()})


def on_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch on a device."""
    return pytree.tree_map(lambda leaf: leaf.to(device, non_blocking=True), batch)


@contextmanager
def evaluating(meta: MetaLearner) -> Iterator[None]:
    """Inside, every module of the learner is in evaluation mode, and nothing is recorded."""
    modes = [(module, module.training) for module in meta.modules()]
    capture = meta.capture
    meta.eval()
    # Batches of many lengths would each be recorded.
    meta.capture = False
    try:
        yield
    finally:
        meta.capture = capture
        for module, training in modes:
            module.training = training


def _measured(meta: MetaLearner, support: Any, query: Any, steps: int) -> dict[str, Tensor]:
    """Loss and metrics ``[tasks]`` after some steps."""
    losses, metrics = meta.adapt(support, steps).losses(meta.task_losses, query)
    found = {"loss": losses, **metrics}
    return {name: value.double().reshape(len(losses), -1).mean(1).cpu() for name, value in found.items()}
