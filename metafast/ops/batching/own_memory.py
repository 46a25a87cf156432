"""``as_strided`` on tensors that share their memory with other tasks' ones."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor


class OwnMemoryNeededError(RuntimeError):
    """The forward looks at memory from its beginning, where another task's numbers are."""


class _Views(threading.local):
    value = False


_views = _Views()


@contextlib.contextmanager
def views_of_tasks() -> Iterator[None]:
    """Parameters and inputs are views of tensors that hold all tasks'."""
    before, _views.value = _views.value, True
    try:
        yield
    finally:
        _views.value = before


def as_strided(input: Tensor, *_: Any, **__: Any) -> Any:
    """Refuses to count from the beginning of memory that tasks share.

    Raises:
        OwnMemoryNeededError: inside of :func:`views_of_tasks`.
    """
    # Torch computes the shapes of what is recorded by tensors without memory, and with this function.
    if _views.value and input.device.type != "meta":
        raise OwnMemoryNeededError("as_strided on a tensor that shares its memory with other tasks")
    return NotImplemented
