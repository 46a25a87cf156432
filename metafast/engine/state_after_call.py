"""Compares the state of a model after tasks side by side with its state after the loop over tasks, and puts it back.

A loop calls the model once per task. Under vmap one call serves all tasks: a counter counts one call, and a tensor that the
model keeps is one of all tasks, and dead when vmap is over. Values that are equal for all tasks and at the next call (a
mask, a rotary table) may stay. For everything else tasks run in the loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.engine.module_attributes import Attributes, Change, replace_tensors, tensors_in
from metafast.engine.replay_state import Buffers, RandomState, written_parameters
from metafast.engine.stray_tensors import BatchedStrays, forget

_functorch = torch._C._functorch


class StateBefore:
    """A module's attributes, buffers and parameters that its forward writes to, and the random state, before a call.

    Args:
        module: is called.
        device: where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._attributes = Attributes(module)
        self._buffers = Buffers(module)
        self._random = RandomState(device)
        self._tables = [(p, p.detach().clone()) for p in written_parameters(module).values()]

    def restore(self) -> None:
        """Puts attributes, buffers and random state back."""
        self._attributes.restore()
        self._buffers.restore()
        self._random.restore()
        self._restore_tables()

    def _restore_tables(self) -> None:
        for parameter, values in self._tables:
            # Without a new version: graphs hold copies.
            parameter.data.copy_(values)

    def restore_random(self) -> None:
        """Puts the random state alone back."""
        self._random.restore()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """For calls without a graph that leave everything as it is. Buffers are not written to: a graph may hold them."""
        with torch.no_grad(), self._buffers.scratch():
            try:
                yield
            finally:
                self._attributes.restore()
                self._random.restore()
                self._restore_tables()

    def difference(self, again: Callable[[], Any], settled: set[str], strays: BatchedStrays | None) -> str | None:
        """How the state after a call under vmap differs from the state after a loop over tasks; None if it does not.

        Tensors of a finished vmap become ordinary ones: the last task's, as in a loop.

        Args:
            again: makes the call once more.
            settled: paths of what is known to be the same after the next call, or not to be read by it; grows.
            strays: of the call, to look outside of the module, too.
        """
        of_tasks = self._made_ordinary()
        changes = self.changes()
        for change in changes:
            # What is in a list stays there, and there are more after each call.
            if change.path in of_tasks and not (isinstance(change.now, Tensor) and change.now.is_floating_point()):
                return f"the call leaves something of each task in {change.path}"
        if strays is not None and (left := strays.left()):
            return f"the call puts tensors of single tasks into {forget(left)}, which vmap would leave dead there"
        unknown = {change.path for change in changes} - settled
        if not unknown:
            return None
        after = StateBefore(self._module, self._device)
        with after.scratch():
            expected = again()
            moved = [
                change.path
                for change in after.changes()
                if change.path not in of_tasks and not _is_equal(change.before, change.now)
            ]
        if moved:
            return f"each call of the model changes {', '.join(moved)}, and vmap calls it once for all tasks"
        found = expected
        if of_tasks:
            with after.scratch():
                for change in changes:
                    if change.path in of_tasks:
                        change.holder[change.key] = torch.full_like(change.now, torch.nan)
                found = again()
        if not all(map(_is_equal, _tensors(expected), _tensors(found))):
            return f"each call of the model reads what the call before, of another task, left in {', '.join(of_tasks)}"
        settled.update(unknown)
        return None

    def _made_ordinary(self) -> set[str]:
        """Puts plain tensors in the places of those of a finished vmap; the paths where tasks have different ones."""
        return {change.path for change in self.changes() if not _made_ordinary(change)}

    def influence(self, result: Any, again: Callable[[], Any]) -> list[str]:
        """Paths that a call changes and that the next call depends on, so that the order of calls matters.

        Args:
            result: of the call.
            again: makes the call once more.
        """
        changes = self.changes()
        if not changes:
            return []
        with StateBefore(self._module, self._device).scratch():
            self._random.restore()
            # Rows that the first call has shortened would be the change.
            self._restore_tables()
            found = again()
        same = all(map(_is_equal, _tensors(result), _tensors(found)))
        return [] if same else [change.path for change in changes]

    def changes(self) -> list[Change]:
        """The differences from the state before the call."""
        return [
            Change(path.removeprefix("model."), *rest)
            for path, *rest in (*self._attributes.changes(), *self._buffers.changes())
        ]


def _made_ordinary(change: Change) -> bool:
    plain = {id(tensor): _last(tensor) for tensor in tensors_in(change.now) if _functorch.is_batchedtensor(tensor)}
    replace_tensors(change, lambda tensor: plain[id(tensor)][0] if id(tensor) in plain else tensor)
    return all(same for _, same in plain.values())


def _last(tensor: Tensor) -> tuple[Tensor, bool]:
    """The last task's part of a tensor of a finished vmap, and whether it is the others', too."""
    dim, value = _functorch.maybe_get_bdim(tensor), _functorch.get_unwrapped(tensor)
    # The tensor of all tasks is not kept for the sake of one task's.
    return of_last_task(tensor).clone(), not value.requires_grad and _is_same_along(value, dim)


def of_last_task(tensor: Tensor) -> Tensor:
    """A tensor that a call under a vmap that is over has left, as the last task alone leaves it."""
    if not _functorch.is_batchedtensor(tensor):
        return tensor
    value: Tensor = _functorch.get_unwrapped(tensor)
    return value.select(_functorch.maybe_get_bdim(tensor), -1)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _is_same_along(value: Tensor, dim: int) -> bool:
    return _is_equal(value.narrow(dim, 0, 1).expand_as(value), value)


def _is_equal(before: Any, now: Any) -> bool:
    """Whether two values are tensors with equal values, the second for all tasks where it is of a vmap that is over."""
    if not isinstance(before, Tensor) or not isinstance(now, Tensor) or before.dtype != now.dtype:
        return False
    while _functorch.is_batchedtensor(now):
        before, now = before.unsqueeze(_functorch.maybe_get_bdim(now)), _functorch.get_unwrapped(now)
        before = before.expand_as(now) if before.ndim == now.ndim else before
    return before.shape == now.shape and bool(torch.isclose(before, now, rtol=0, atol=0, equal_nan=True).all())
