"""Losses that are not finite, by task and step."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_tasks(support_losses: Tensor, query_losses: Tensor | None) -> Tensor:
    """For each task ``[T]``, whether all its losses are finite."""
    finite = torch.isfinite(support_losses).all(0)
    return finite if query_losses is None else finite & torch.isfinite(query_losses)


def check_finite(support_losses: Tensor, query_losses: Tensor | None) -> None:
    """Checks after the whole inner loop, so that the CPU waits for a GPU once.

    Raises:
        FloatingPointError: naming the first task and step.
    """
    if not finite_tasks(support_losses, query_losses).all():
        raise FloatingPointError(describe_not_finite(support_losses, query_losses)[0])


def describe_not_finite(support_losses: Tensor, query_losses: Tensor | None) -> list[str]:
    """One sentence per task with a loss that is not finite, about its first such loss in the order of steps."""
    found: dict[int, str] = {}
    for step, task in (~torch.isfinite(support_losses)).nonzero().tolist():
        value = support_losses[step, task].item()
        found.setdefault(task, f"support loss: expected finite values, got {value} in task {task} at inner step {step}")
    if query_losses is not None:
        for (task,) in (~torch.isfinite(query_losses)).nonzero().tolist():
            value = query_losses[task].item()
            found.setdefault(
                task, f"query loss: expected finite values, got {value} in task {task} after the last inner step"
            )
    return list(found.values())
