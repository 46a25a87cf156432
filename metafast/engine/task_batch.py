"""Batches of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

LossFn = Callable[[nn.Module, Any], Any]
Params = dict[str, Tensor]


class PerStep:
    """A support set per inner step: ``meta(metafast.PerStep([batch_0, …, batch_K−1]), query)``.

    Args:
        batches: support sets, at least as many as there are inner steps.

    Raises:
        ValueError: ``batches`` is empty.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches: expected one per step, got none")

    def __repr__(self) -> str:
        return f"PerStep({self.batches!r})"


# As a pytree, it is cut into chunks of tasks, converted and counted as any batch is.
pytree.register_pytree_node(
    PerStep,
    lambda steps: (steps.batches, None),
    lambda batches, _: PerStep(list(batches)),
    serialized_type_name="metafast.PerStep",
)


def support_at(support: Any, step: int) -> Any:
    """The support set of a step."""
    return support.batches[step] if isinstance(support, PerStep) else support


def check_support_steps(support: Any, steps: int) -> None:
    """Raises ValueError where ``support`` ends before the inner steps do."""
    if isinstance(support, PerStep) and len(support.batches) < steps:
        raise ValueError(f"support: expected PerStep of at least {steps} batches, got {len(support.batches)}")


def check_batches(support: Any, query: Any, steps: int) -> int:
    """The number of tasks of a call.

    Raises:
        TypeError: a leaf of a batch is not a tensor.
        ValueError: ``query`` has another number of tasks than ``support``, or ``support`` ends before the inner steps do.
    """
    tasks = count_tasks(support, "support")
    check_support_steps(support, steps)
    if query is not None and (found := count_tasks(query, "query")) != tasks:
        raise ValueError(f"query: expected {tasks} tasks, as many as in support, got {found}")
    return tasks


def count_tasks(batch: Any, name: str) -> int:
    """The number of tasks of a batch: the common first dimension of every tensor in it.

    Raises:
        TypeError: a leaf of ``batch`` is not a tensor, or there is none.
        ValueError: the first dimensions differ, or there is no task.
    """
    leaves = pytree.tree_leaves(batch)
    if not leaves:
        raise TypeError(
            f"{name}: expected tensors whose first dimension is the task, got {type(batch).__name__} without any"
        )
    for leaf in leaves:
        if isinstance(leaf, Mapping):
            raise TypeError(f"{name}: expected a dict of tensors, got {type(leaf).__name__}; pass dict({name})")
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}: expected tensors whose first dimension is the task, got {type(leaf).__name__}")
        if leaf.ndim == 0:
            raise ValueError(f"{name}: expected tensors whose first dimension is the task, got a scalar tensor")
    counts = {leaf.shape[0] for leaf in leaves}
    if len(counts) > 1:
        raise ValueError(f"{name}: expected the same number of tasks in every tensor, got {sorted(counts)}")
    (tasks,) = counts
    if tasks == 0:
        raise ValueError(f"{name}: expected at least one task, got an empty task batch")
    return tasks


def select_tasks(batch: Any, index: Tensor | slice) -> Any:
    """Some of the tasks of a batch. None stands for no batch and stays None."""
    return None if batch is None else pytree.tree_map(lambda leaf: leaf[index], batch)


def check_count(name: str, count: int, minimum: int = 0) -> int:
    """Returns ``count``. Raises TypeError or ValueError where it is no int of at least ``minimum``."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
    if count < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {count}")
    return count


def micro_batches(batch: Any, count: int) -> list[tuple[float, Any]]:
    """The examples of every task (second dimension), cut into at most ``count`` parts, and the share of each part.

    Raises:
        ValueError: a tensor has no second dimension, or these differ.
    """
    leaves, structure = pytree.tree_flatten(batch)
    sizes = {leaf.shape[1] if leaf.ndim > 1 else 0 for leaf in leaves}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            "support: micro_batches cuts the second dimension of every tensor, the examples of a task; expected the same "
            f"in all, got shapes {', '.join(str(tuple(leaf.shape)) for leaf in leaves)}"
        )
    (examples,) = sizes
    parts = zip(*(leaf.tensor_split(min(count, examples), dim=1) for leaf in leaves), strict=True)
    return [(part[0].shape[1] / examples, pytree.tree_unflatten(list(part), structure)) for part in parts]
