"""Attributes of a model's modules, besides parameters and buffers, that a call in Python leaves changed."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections import deque
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Of nn.Module itself. New parameters, buffers and submodules count as changes; what the present ones hold does not.
_MEMBERS = ("_parameters", "_buffers", "_modules")
_MODULE_KEYS = frozenset(vars(nn.Module())) - {"training"}
# Values that hold nothing that a call could change.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_LEAVES = frozenset((*_PLAIN, Tensor, nn.Parameter))
_CONTAINERS = (dict, list, deque, set)
_DEPTH = 4
# What is longer, or more, is data and not a model's state.
_LONGEST = 1000
_MOST = 5000
# Whose objects a model may hold for other reasons than to compute with them.
_FOREIGN = ("torch", "lightning", "pytorch_lightning", "metafast")


class Change(NamedTuple):
    """A place that holds something else than before.

    Attributes:
        path: name of the place, such as ``encoder.mask`` or ``tables[12]``.
        holder, key: the place; the key is None where the holder is a set, which differs as a whole.
        before, now: the earlier and the present value; None also stands for no value.
    """

    path: str
    holder: Any
    key: Any
    before: Any
    now: Any


class Attributes:
    """The attributes of modules and objects as they are now, with the lists, dicts and objects that those hold.

    Args:
        roots: modules, with their submodules, and other objects, such as a loss with attributes. Functions have no
            attributes here.
    """

    def __init__(self, *roots: object) -> None:
        self._roots = roots
        # (path, holder, copy); for members, entries that were there already do not count.
        self._kept: list[tuple[str, Any, Any, bool]] = []
        self._seen: set[int] = set()
        self._left = _MOST
        for root in roots:
            self._keep("", root, _DEPTH)

    def keep_changed(self) -> None:
        """Forgets everything if nothing has changed."""
        if not self.changes():
            self._kept = []

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Puts the earlier attributes in place for the ``with`` block, and throws changes of them away."""
        now = Attributes(*self._roots)
        self.restore()
        try:
            yield
        finally:
            now.restore()

    def changes(self) -> list[Change]:
        """The places where tensors and objects are other ones, or numbers, strings and the like have other values."""
        found: list[Change] = []
        for path, holder, before, members in self._kept:
            if _is_same(holder, before):
                continue
            if isinstance(holder, set):
                found.append(Change(path, holder, None, before, set(holder)))
                continue
            for key in _keys(holder) | _keys(before):
                old, new = _at(before, key), _at(holder, key)
                if not (_equal(old, new) or (members and old is not None)):
                    found.append(Change(_entry(path, holder, key), holder, key, old, new))
        return found

    def restore(self) -> None:
        """Puts back what was there."""
        for _, holder, before, members in self._kept:
            if _is_same(holder, before):
                continue
            if isinstance(holder, dict):
                for key in list(holder.keys() - before.keys()):
                    del holder[key]
                holder.update({k: v for k, v in before.items() if not (members and v is not None and k in holder)})
            else:
                holder.clear()
                holder.update(before) if isinstance(holder, set) else holder.extend(before)

    def _keep(self, path: str, value: Any, depth: int) -> None:
        if type(value) in _LEAVES or isinstance(value, (type, Tensor)) or not depth or id(value) in self._seen:
            return
        self._left -= 1
        if self._left < 0:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            for name, module in value.named_modules(prefix=path):
                self._keep_module(name, module, depth)
        elif isinstance(value, MethodType):
            self._keep(path, value.__self__, depth)
        elif isinstance(value, functools.partial):
            self._keep_parts(path, {"func": value.func, "args": value.args, **value.keywords}, depth)
        elif isinstance(value, _CONTAINERS):
            if len(value) <= _LONGEST:
                self._kept.append((path, value, value.copy(), False))
                self._keep_parts(path, value, depth)
        elif isinstance(value, tuple):
            self._keep_parts(path, value, depth)
        elif _has_attributes(value) and type(value).__module__.partition(".")[0] not in _FOREIGN:
            self._kept.append((path, vars(value), vars(value).copy(), False))
            self._keep_parts(path, vars(value), depth)

    def _keep_module(self, path: str, module: nn.Module, depth: int) -> None:
        self._seen.add(id(module))
        if getattr(module, "is_meta_learner", False):
            return
        own = vars(module)
        self._kept.append((path, own, own.copy(), False))
        self._kept += [(path, own[key], own[key].copy(), True) for key in _MEMBERS]
        for key in own.keys() - _MODULE_KEYS:
            if type(own[key]) not in _LEAVES:
                self._keep(_joined(path, key), own[key], depth - 1)

    def _keep_parts(self, path: str, parts: Any, depth: int) -> None:
        for key, part in _items(parts):
            if type(part) not in _LEAVES:
                self._keep(_entry(path, parts, key), part, depth - 1)


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors of a changed value: itself, or what containers and objects hold."""
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, (nn.Module, type)):
        parts = vars(value) if _has_attributes(value) and not isinstance(value, _CONTAINERS) else value
        for _, part in _items(parts):
            yield from tensors_in(part, depth - 1)


def replace_tensors(change: Change, replacement: Callable[[Tensor], Tensor]) -> None:
    """Puts other tensors in the places of those in a changed value."""
    if change.key is None:
        change.holder.clear()
        change.holder.update(_replaced(change.now, replacement, _DEPTH))
    elif change.now is not None:
        change.holder[change.key] = _replaced(change.now, replacement, _DEPTH)


def _replaced(value: Any, replacement: Callable[[Tensor], Tensor], depth: int) -> Any:
    if isinstance(value, Tensor):
        return replacement(value)
    if not depth or isinstance(value, (nn.Module, type)):
        return value
    if isinstance(value, tuple):
        parts = [_replaced(part, replacement, depth - 1) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, set):
        return {_replaced(part, replacement, depth - 1) for part in value}
    holder: Any = value if isinstance(value, _CONTAINERS) else vars(value) if _has_attributes(value) else None
    if holder is not None:
        for key, part in list(_items(holder)):
            if type(part) not in _PLAIN:
                holder[key] = _replaced(part, replacement, depth - 1)
    return value


def _has_attributes(value: Any) -> bool:
    # Functions and Python's modules have a __dict__ too; theirs is not a model's state.
    return hasattr(value, "__dict__") and not isinstance(value, (FunctionType, ModuleType, nn.Module, type, Tensor))


def _is_same(holder: Any, before: Any) -> bool:
    """Whether two containers hold the very same things in the same order: by far the most common case."""
    if len(holder) != len(before):
        return False
    if isinstance(holder, dict):
        return all(map(operator.is_, holder.values(), before.values())) and holder.keys() == before.keys()
    return holder == before if isinstance(holder, set) else all(map(operator.is_, holder, before))


def _equal(old: Any, new: Any) -> bool:
    """Whether two values are the same, or plain values or containers of such that are equal."""
    if old is new:
        return True
    if type(old) is not type(new) or isinstance(old, (Tensor, nn.Module)):
        return False
    if isinstance(old, (*_CONTAINERS, tuple)):
        if isinstance(old, set):
            return old == new
        return _keys(old) == _keys(new) and all(_equal(_at(old, key), _at(new, key)) for key in _keys(old))
    # NaN is not equal to itself, and stays what it is.
    return isinstance(old, _PLAIN) and (old == new or (old != old and new != new))


def _items(parts: Any) -> list[tuple[Any, Any]]:
    if isinstance(parts, dict):
        return list(parts.items())
    if isinstance(parts, (list, tuple, deque, set)):
        return list(enumerate(parts))
    return []


def _keys(holder: Any) -> set[Any]:
    return set(holder) if isinstance(holder, dict) else set(range(len(holder)))


def _at(holder: Any, key: Any) -> Any:
    if isinstance(holder, dict):
        return holder.get(key)
    return holder[key] if key < len(holder) else None


def _entry(path: str, holder: Any, key: Any) -> str:
    return _joined(path, key) if isinstance(key, str) and key.isidentifier() else f"{path}[{key!r}]"


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
