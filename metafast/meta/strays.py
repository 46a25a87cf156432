"""Tensors that outlive the call that made them although they are of use inside of it alone: in caches outside of the model,
or wherever a hook put them."""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_functorch = torch._C._functorch
_Cached = type(functools.lru_cache(lambda: None))
_KINDS = (Tensor, nn.Parameter, FakeTensor)


def batched_strays(collections: tuple[int, ...] | None = None) -> list[Tensor]:
    """What is left of tensors of a ``vmap`` that is over.

    Args:
        collections: :func:`collections_so_far` before the call. What the call made is among the young objects, unless
            the garbage collector has taken it for old since.
    """
    young = collections is not None and collections[1:] == collections_so_far()[1:]
    return _alive(_functorch.is_batchedtensor, young)


def fake_strays(mode: Any) -> list[Tensor]:
    """Tensors without data of a recording that is over."""
    return _alive(lambda tensor: getattr(unwrapped(tensor), "fake_mode", None) is mode, young=False)


def unwrapped(tensor: Tensor) -> Tensor:
    """What functorch's transforms have wrapped."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def collections_so_far() -> tuple[int, ...]:
    """How many times the garbage collector went through each generation."""
    return tuple(generation["collections"] for generation in gc.get_stats())


def forget(strays: list[Tensor]) -> str:
    """Takes them out of the dicts, lists and caches that hold them, and says what these are."""
    names: set[str] = set()
    ours = {id(stray) for stray in strays}
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


def _alive(wanted: Callable[[Tensor], bool], young: bool) -> list[Tensor]:
    if not _found(wanted, young):
        return []
    # Garbage that waits for its collection is no stray.
    gc.collect()
    return _found(wanted, young=False)


def _found(wanted: Callable[[Tensor], bool], young: bool) -> list[Tensor]:
    objects = [*gc.get_objects(0), *gc.get_objects(1)] if young else gc.get_objects()
    return [o for o in objects if type(o) in _KINDS and wanted(o)]
