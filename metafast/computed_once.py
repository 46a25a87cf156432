"""Results that are computed once: equal calls of torch's functions, of the same tensors, within one meta-step.

Inner steps run the same model on the same support set. What depends on no adapted parameter is the same in each of them: the
body of ANIL, layers below the first adapter, masks. Python runs it every time; a call of torch's functions whose tensors are
all known gives the result that it gave before, with its graph, so that derivatives go through it once as well.

Known are the batches, the parameters that no step changes, and results of known tensors. A call is computed anew if it draws
random numbers, if it updates running statistics, or if one of its tensors or results has been written to in the meantime.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metafast.ops import torch_internals

logger = logging.getLogger("metafast")

# They change what a tensor is, and neither its values nor its version.
_CHANGES = {
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.requires_grad_,
    Tensor.detach_,
    Tensor.retain_grad,
}
# They free graphs that results share.
_FREES_GRAPHS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
# Devices with a mode that computes in half precision.
_AUTOCAST = ("cpu", "cuda")
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Local(threading.local):
    session: ComputedOnce | None = None
    inside: ComputedOnce | None = None


_local = _Local()


class _Result(NamedTuple):
    """A known tensor.

    Attributes:
        value: without the dimension of ``vmap``.
        dim: that dimension; None where there is none.
        version: of the value when it became known.
    """

    value: Tensor
    dim: int | None
    version: int


# In the place of a result that is no tensor, or another one at each call: neither is watched again.
_ANEW = object()


class _UnknownError(Exception):
    """An argument is not known, or not comparable."""


class ComputedOnce(TorchFunctionMode):
    """While it is entered, calls of torch's functions on known tensors are computed once.

    Args:
        known: tensors that stay as they are.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._versions: dict[int, int] = {}
        # Held, so that no other tensor gets their identity.
        self._held: list[Tensor] = []
        self._results: dict[Any, Any] = {}
        self._stopped = False
        self.paused = False
        self.taken: Counter[str] = Counter()
        for tensor in known:
            self._know(tensor)

    def __enter__(self) -> ComputedOnce:
        self._outer = _local.inside
        _local.inside = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _local.inside = self._outer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._stopped or self.paused or func in torch_internals.QUESTIONS:
            return func(*args, **kwargs)
        if func in _FREES_GRAPHS:
            self._stop()
        elif func in _CHANGES or getattr(func, "__name__", "") in ("__set__", "__setattr__"):
            self._forget(args[0])
        else:
            return self.call(func, args, kwargs)
        return func(*args, **kwargs)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, or what it was before."""
        if self._stopped or self.paused:
            return function(*args, **kwargs)
        if _updates_statistics(function, args, kwargs):
            result = function(*args, **kwargs)
            # Running statistics, which its kernels write without a new version.
            for leaf in pytree.tree_leaves((args[1:], kwargs)):
                self._forget(leaf)
            return result
        try:
            key = self._call_key(function, args, kwargs)
            found = self._results.get(key)
            if found is not None and found is not _ANEW:
                return self._again(function, found)
        except _UnknownError:
            return function(*args, **kwargs)
        if found is _ANEW:
            return function(*args, **kwargs)
        watch = _Watch()
        with anew(), watch:
            result = function(*args, **kwargs)
        # Of arguments that the call has written to, the key has become unknown.
        with contextlib.suppress(_UnknownError):
            if key == self._call_key(function, args, kwargs):
                self._results[key] = _ANEW
                if watch.repeatable:
                    self._results[key] = self._kept(result)
        return result

    def _call_key(self, function: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """What tells calls apart: the function, its arguments, and the modes that change results."""
        modes = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in _AUTOCAST)
        return (function, torch.is_grad_enabled(), *modes, *self._key(args), *self._key(kwargs))

    def _key(self, value: Any) -> Iterator[Any]:
        """What tells arguments apart.

        Raises:
            _UnknownError: a tensor is not known, or something else than numbers, names and the like is given.
        """
        if isinstance(value, Tensor):
            value, dim = _unwrapped(value)
            if self._versions.get(id(value)) != value._version:
                raise _UnknownError
            yield id(value), dim
        elif isinstance(value, (tuple, list)):
            yield type(value), len(value)
            for part in value:
                yield from self._key(part)
        elif isinstance(value, dict):
            yield tuple(value)
            for part in value.values():
                yield from self._key(part)
        elif isinstance(value, slice):
            yield slice
            yield from self._key((value.start, value.stop, value.step))
        elif isinstance(value, _PLAIN) or value is Ellipsis:
            yield type(value), value
        else:
            raise _UnknownError

    def _kept(self, result: Any) -> Any:
        """A result without ``vmap``'s dimension, its tensors known from now on.

        Raises:
            _UnknownError: it holds something else than tensors.
        """
        if isinstance(result, Tensor):
            value, dim = _unwrapped(result)
            if id(value) not in self._versions:
                self._know(value)
            return _Result(value, dim, value._version)
        if type(result) in (tuple, list) and result:
            return type(result)(map(self._kept, result))
        raise _UnknownError

    def _again(self, function: Any, kept: Any) -> Any:
        """A result of before.

        Raises:
            _UnknownError: it has been written to.
        """
        if not isinstance(kept, _Result):
            return type(kept)(self._again(function, part) for part in kept)
        if kept.value._version != kept.version or self._versions.get(id(kept.value)) != kept.version:
            raise _UnknownError
        self.taken[getattr(function, "__name__", "?")] += 1
        return kept.value if kept.dim is None else torch_internals.wrap_batched(kept.value, kept.dim, _level())

    def _know(self, tensor: Tensor) -> None:
        self._held.append(tensor)
        self._versions[id(tensor)] = tensor._version

    def _forget(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            with contextlib.suppress(_UnknownError):
                self._versions.pop(id(_unwrapped(tensor)[0]), None)

    def _stop(self) -> None:
        self._stopped = True
        self._results.clear()


def _updates_statistics(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether this is batch norm or instance norm in training mode."""
    name = getattr(function, "__name__", "")
    if "batch_norm" not in name and "instance_norm" not in name:
        return False
    flags = [kwargs[flag] for flag in ("training", "use_input_stats") if flag in kwargs] or args[5:6]
    return bool(flags[0]) if flags else "instance_norm" in name


class _Watch(TorchDispatchMode):
    """Whether operations give the same again, and change nothing that no version tells of."""

    repeatable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.repeatable = False
        # Its kernels write running statistics without a new version.
        if "batch_norm" in func.__name__ and any(value is True for value in args):
            self.repeatable = False
        return func(*args, **(kwargs or {}))


def _unwrapped(tensor: Tensor) -> tuple[Tensor, int | None]:
    if not torch_internals.is_batched(tensor):
        if torch_internals.is_tracking_gradients(tensor) or torch_internals.is_functional(tensor):
            raise _UnknownError
        return tensor, None
    if torch_internals.level_of(tensor) != _level():
        raise _UnknownError
    value, dim = torch_internals.unwrap_batched(tensor, _level())
    if torch_internals.is_wrapped(value):
        raise _UnknownError
    return value, dim


def _level() -> int:
    level = torch_internals.current_level()
    if level is None:
        raise _UnknownError
    return int(level)


@contextlib.contextmanager
def computing_once(model: nn.Module, known: Iterable[Tensor]) -> Iterator[None]:
    """Inside, calls of the model that enter :func:`once` share their results, in this thread.

    Args:
        model: is called. One that ``torch.compile`` made is computed as ever.
        known: tensors that stay as they are.
    """
    if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
        yield
        return
    before = _local.session
    session = _local.session = ComputedOnce(known)
    try:
        yield
    finally:
        _local.session = before
        if session.taken:
            logger.debug(
                "computed once: %s", ", ".join(f"{name} (again {n} times)" for name, n in sorted(session.taken.items()))
            )


def once() -> contextlib.AbstractContextManager[Any]:
    """Enters the session of :func:`computing_once`, where there is one."""
    return _local.session or contextlib.nullcontext()


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Inside, everything is computed, also where :func:`once` is entered."""
    mode = _local.inside
    if mode is None:
        yield
        return
    before, mode.paused = mode.paused, True
    try:
        yield
    finally:
        mode.paused = before


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` of one that torch does not know, computed once where that is entered."""
    mode = _local.inside
    return function(*args, **kwargs) if mode is None else mode.call(function, args, kwargs)
