"""Tensors that outlive the call that made them although they are of use only inside of the call.

They are in caches outside of the model, or wherever a hook put them.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_functorch = torch._C._functorch
_Cached = type(functools.lru_cache(lambda: None))
_KINDS = (Tensor, nn.Parameter, FakeTensor)


class BatchedStrays:
    """Finds what a call leaves of the tensors of its ``vmap``, which are dead when that is over.

    New objects are the youngest ones as long as the garbage collector rests, and they alone are looked at.
    """

    def __init__(self) -> None:
        self._before: set[int] = set()
        self._found: list[weakref.ref[Tensor]] = []

    def __enter__(self) -> BatchedStrays:
        self._enabled = gc.isenabled()
        gc.disable()
        self._before = {id(tensor) for tensor in _youngest()}
        return self

    def __exit__(self, *_: object) -> None:
        self._found = [weakref.ref(tensor) for tensor in _youngest() if id(tensor) not in self._before]
        if self._enabled:
            gc.enable()

    def left(self) -> list[Tensor]:
        """The tensors that something still holds."""
        if any(found() is not None for found in self._found):
            # Garbage that waits for its collection is no stray.
            gc.collect()
        return [tensor for tensor in (found() for found in self._found) if tensor is not None]


def _youngest() -> list[Tensor]:
    return [o for o in gc.get_objects(0) if type(o) in _KINDS and _functorch.is_batchedtensor(o)]


def fake_strays(mode: Any) -> list[Tensor]:
    """Tensors without data of a recording that is over."""

    def found() -> list[Tensor]:
        return [o for o in gc.get_objects() if type(o) in _KINDS and getattr(unwrapped(o), "fake_mode", None) is mode]

    if not found():
        return []
    gc.collect()
    return found()


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensors that functorch's transforms have wrapped."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


@contextmanager
def _thawed() -> Iterator[None]:
    """Inside, the collector also tells of objects that were frozen, such as the caches of modules."""
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    try:
        yield
    finally:
        if frozen:
            # What waits for its collection must not be kept for good.
            gc.collect()
            gc.freeze()


def forget(strays: list[Tensor]) -> str:
    """Takes them out of the dicts, lists and caches that hold them, and says what these are."""
    names: set[str] = set()
    ours = {id(stray) for stray in strays}
    with _thawed():
        for stray in strays:
            for holder in gc.get_referrers(stray):
                if holder is strays:
                    continue
                if isinstance(holder, _Cached):
                    holder.cache_clear()
                    names.add(f"the cache of {holder.__module__}.{holder.__qualname__}")
                elif isinstance(holder, dict):
                    for key in [key for key, value in holder.items() if id(value) in ours]:
                        del holder[key]
                        names.add(f"the entry {key!r} of a dict")
                elif isinstance(holder, (list, deque)):
                    kept = [value for value in holder if id(value) not in ours]
                    holder.clear()
                    holder.extend(kept)
                    names.add(f"a {type(holder).__name__}")
                elif isinstance(holder, set):
                    holder -= {value for value in holder if id(value) in ours}
                    names.add("a set")
    return ", ".join(sorted(names)) or "something that Python's garbage collector does not tell"
