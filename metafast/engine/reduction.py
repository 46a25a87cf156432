"""From the losses of tasks to one number, on one process or on many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

REDUCTIONS = ("mean", "sum", "global_mean")


def check_reduction(reduction: str) -> None:
    """Raises ValueError where ``reduction`` is none."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def check_weights(weights: Tensor | None, tasks: int, device: torch.device) -> Tensor:
    """The weights ``[T]`` of the tasks in the loss, 1 where none are given.

    Raises:
        TypeError, ValueError: they are not ``tasks`` numbers of at least 0, one above, or require a gradient.
    """
    if weights is None:
        return torch.ones(tasks, dtype=torch.float64, device=device)
    if not isinstance(weights, Tensor):
        raise TypeError(f"task_weights: expected a tensor [{tasks}], got {type(weights).__name__}")
    if weights.shape != (tasks,):
        raise ValueError(f"task_weights: expected shape ({tasks},), one per task, got {tuple(weights.shape)}")
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "task_weights: expected a tensor that requires no gradient, since none is computed for it; detach() it, or "
            "weight the losses in loss_fn"
        )
    if not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(f"task_weights: expected at least 0 and a sum above 0, got {weights.tolist()}")
    return weights.detach().to(device=device, dtype=torch.float64)


class Ranks:
    """Messages between the ranks of a ``global_mean``: their weights, or that they failed.

    Args:
        reduction: the learner's.
        device: where messages are.
        sharded: whether the model's parameters are; then ranks work together with any reduction.
    """

    def __init__(self, reduction: str, device: torch.device, sharded: bool = False) -> None:
        self._reduction = reduction
        self._together = (reduction == "global_mean" or sharded) and dist.is_available() and dist.is_initialized()
        self._device = device
        self._told = False

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error inside, before :meth:`divisor`, is raised in every rank: none waits for one that is gone."""
        try:
            yield
        except Exception:
            if self._together and not self._told:
                self._tell(0.0, failed=True)
            raise

    def check_same_tasks(self, tasks: int) -> None:
        """Compares the number of tasks with the other ranks', with whom this one gathers parameters.

        Raises:
            ValueError: on every rank, where they differ.
            RuntimeError: another rank failed.
        """
        total, squares = self._tell_or_fail(tasks, tasks**2)
        ranks = dist.get_world_size()
        if total**2 != ranks * squares:
            raise ValueError(
                f"support: expected the same number of tasks on every rank, since ranks gather sharded parameters together, "
                f"got {tasks} here and {total / ranks:g} on average"
            )

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside, ranks gather parameters: others would not understand a message that this one failed."""
        self._told = True
        yield
        self._told = False

    def divisor(self, weights: Tensor) -> float:
        """The divisor of the weighted sum of this rank's losses.

        ``DistributedDataParallel`` takes the mean of the ranks' gradients; with the ranks' share of all tasks in the
        divisor, that is the mean over tasks, however many each rank has.

        Raises:
            RuntimeError: another rank failed.
        """
        divisor = 0.0 if self._reduction == "sum" else weights.sum().item()
        if self._together:
            total = self._tell_or_fail(divisor)[0]
            if self._reduction == "global_mean":
                divisor = total / dist.get_world_size()
        # Neither a sum nor losses without any weight are divided.
        return divisor or 1.0

    def _tell_or_fail(self, first: float, second: float = 0.0) -> list[float]:
        *totals, failed = self._tell(first, second)
        if failed:
            raise RuntimeError("another rank failed before the meta-gradient; its own error says why")
        return totals

    def _tell(self, first: float, second: float = 0.0, failed: bool = False) -> list[float]:
        """The sums of the numbers over all ranks, and the number of ranks that failed."""
        self._told = True
        message = torch.tensor([first, second, float(failed)], dtype=torch.float64, device=self._device)
        dist.all_reduce(message)
        return message.tolist()
