"""Swaps metafast's ops into models that call torch's.

Names are replaced where models look them up: in ``torch.nn.functional`` and ``torch`` (which also catches ``nn.Linear``,
``nn.MultiheadAttention`` and Hugging Face's ``sdpa``), and in the modules that define the model's classes, which may have
imported them earlier. A replacement is on only in threads and models that asked for it; elsewhere it calls torch's own
function. Names are put back when the last user leaves.

Two of the names are not an op's. Torch's Transformer modules ask one function whether they may take kernels without
derivatives, where nothing seems to require one, as under ``vmap``. The replacement says no. They ask another function
whether a mask is causal. That function looks at values, which a mask per task or one that is being recorded does not have.
Its replacement repeats the ``is_causal`` of the caller, and the mask is added.

Torch's batching rules are wrong for some functions where derivatives are taken outside of ``vmap`` (``ops/batching``). Their
replacements are put in as functions of ``torch`` and as methods of ``torch.Tensor``. The ``forward`` of
batch norm is replaced for modules with ``momentum=None``, which could not be recorded
(``ops/layers/cumulative_batch_norm.py``).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType, TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metafast import computed_once
from metafast.ops.attention import scaled_dot_product_attention
from metafast.ops.attention.causal_bias import is_causal_bias
from metafast.ops.batching import FUNCTIONS, METHODS
from metafast.ops.layers import cumulative_batch_norm
from metafast.ops.layers.embedding import embedding, embedding_bag
from metafast.ops.layers.gelu import gelu
from metafast.ops.layers.layer_norm import layer_norm
from metafast.ops.layers.linear import linear
from metafast.ops.layers.norms import batch_norm, group_norm, instance_norm
from metafast.ops.layers.rms_norm import rms_norm

__all__ = ["Acceleration", "accelerate"]

_torch_attention = torch.nn.functional.scaled_dot_product_attention
_torch_linear = torch.nn.functional.linear
_torch_embedding = torch.embedding
_torch_embedding_bag = torch.embedding_bag
_torch_fastpath = torch.backends.mha.get_fastpath_enabled
_torch_is_causal = torch.nn.modules.transformer._detect_is_causal_mask
# Where torch's own modules look names up.
_TORCHS_MODULES = {"torch", "torch.nn.functional", "torch._C._nn", "torch.backends.mha", "torch.nn.modules.transformer"}
_lock = threading.Lock()
# The name of a module, or a class; the attribute; torch's function.
Place: TypeAlias = str | type
Names: TypeAlias = list[tuple[Place, str, Callable[..., Any]]]
# Where a name is replaced -> how many users want it so.
_users: dict[tuple[Place, str, Callable[..., Any]], int] = {}


class _Depth(threading.local):
    """How many enclosing contexts or model calls of this thread are accelerated."""

    value = 0


_depth = _Depth()


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if _is_torchs(query, key, value):
        mask: Any = args[0] if args else kwargs.get("attn_mask")
        if is_causal_bias(mask):
            # It tells attention from other functions by the name that is replaced.
            function = torch.nn.functional.scaled_dot_product_attention
            result: Tensor = mask.__torch_function__(function, (type(mask),), (query, key, value, *args), kwargs)
            return result
        return _torch_attention(query, key, value, *args, **kwargs)
    return computed_once.call(scaled_dot_product_attention, query, key, value, *args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _is_torchs(input, weight):
        return _torch_linear(input, weight, bias)
    return computed_once.call(linear, input, weight, bias)


def _embedding(weight: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if _is_torchs(weight, indices):
        return _torch_embedding(weight, indices, *args, **kwargs)
    return computed_once.call(embedding, weight, indices, *args, **kwargs)


def _embedding_bag(weight: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Any:
    if _is_torchs(weight, indices):
        return _torch_embedding_bag(weight, indices, *args, **kwargs)
    return computed_once.call(embedding_bag, weight, indices, *args, **kwargs)


def _batched(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of a function whose batching rule is wrong for some arguments."""

    def function(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, Tensor) or _is_torchs(input):
            return original(input, *args, **kwargs)
        result = computed_once.call(ours, input, *args, **kwargs)
        return original(input, *args, **kwargs) if result is NotImplemented else result

    return function


def _of_input(original: Callable[..., Tensor], ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The replacement of a function of which the first argument alone decides whether torch's runs."""

    def function(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _is_torchs(input):
            return original(input, *args, **kwargs)
        return computed_once.call(ours, input, *args, **kwargs)

    return function


def _batch_norm_forward(module: _BatchNorm, input: Tensor) -> Tensor:
    return (cumulative_batch_norm.torch_forward if _is_torchs(input) else cumulative_batch_norm.forward)(module, input)


def _fastpath_enabled() -> bool:
    return _depth.value == 0 and _torch_fastpath()


def _is_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    if _depth.value == 0:
        return _torch_is_causal(mask, is_causal, size)
    return is_causal is True


def _is_torchs(*tensors: Tensor) -> bool:
    """Whether torch's own function has to run.

    That is so where nobody asked for acceleration, and for tensors of a subclass (nested, distributed, user-defined), which
    brings its own meaning of torch's functions. A mode that overrides functions (``with torch.device(...)``, a recording)
    brings none: it sees the operations of the ops.
    """
    return _depth.value == 0 or tensors[0].is_nested or any(map(_has_own_functions, tensors))


def _has_own_functions(tensor: Tensor) -> bool:
    kind = type(tensor)
    return kind is not Tensor and kind.__torch_function__ is not torch._C._disabled_torch_function_impl


# Torch's functions and their replacements; by identity, since builtins of the same name are equal to nothing else.
_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    _torch_attention: _attention,
    _torch_linear: _linear,
    **{
        original: _of_input(original, ours)
        for original, ours in (
            (torch.nn.functional.gelu, gelu),
            (torch.layer_norm, layer_norm),
            (torch.rms_norm, rms_norm),
            (torch.group_norm, group_norm),
            (torch.batch_norm, batch_norm),
            (torch.instance_norm, instance_norm),
        )
    },
    _torch_embedding: _embedding,
    _torch_embedding_bag: _embedding_bag,
    **{original: _batched(original, ours) for original, ours in FUNCTIONS.items()},
    _torch_fastpath: _fastpath_enabled,
    _torch_is_causal: _is_causal,
}
_ORIGINALS = {replacement: original for original, replacement in _REPLACEMENTS.items()}

_METHODS: dict[tuple[Place, str, Callable[..., Any]], Callable[..., Any]] = {
    **{(Tensor, name, getattr(Tensor, name)): _batched(getattr(Tensor, name), ours) for name, ours in METHODS.items()},
    (_BatchNorm, "forward", cumulative_batch_norm.torch_forward): _batch_norm_forward,
}
# Those that their class defines, and does not inherit.
_OWN_METHODS = {(place, name) for place, name, _ in _METHODS if name in vars(place)}


def replaced_names(model: nn.Module) -> Names:
    """The names under which the model may look torch's functions up."""
    modules = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    found: Names = []
    for name in sorted(modules | _TORCHS_MODULES):
        module = sys.modules.get(name)
        for key, value in vars(module).items() if isinstance(module, ModuleType) else ():
            if isinstance(value, (BuiltinFunctionType, FunctionType)):
                original = _ORIGINALS.get(value, value)
                if original in _REPLACEMENTS:
                    found.append((name, key, original))
    return found


def _replace(names: Names) -> None:
    with _lock:
        for name in (*names, *_METHODS):
            _users[name] = _users.get(name, 0) + 1
            if _users[name] > 1:
                continue
            place, attribute, original = name
            if isinstance(place, str):
                setattr(sys.modules[place], attribute, _REPLACEMENTS[original])
            else:
                setattr(place, attribute, _METHODS[name])


def _restore(names: Names) -> None:
    with _lock:
        for name in (*names, *_METHODS):
            _users[name] -= 1
            if _users[name] == 0:
                del _users[name]
                place, attribute, original = name
                if isinstance(place, str):
                    setattr(sys.modules[place], attribute, original)
                elif (place, attribute) in _OWN_METHODS:
                    setattr(place, attribute, original)
                else:
                    delattr(place, attribute)


class Acceleration:
    """The handle that :func:`accelerate` returns; :meth:`remove` or the end of the ``with`` block undoes it."""

    def __init__(self, model: nn.Module) -> None:
        self._names = replaced_names(model)
        _replace(self._names)
        self._hooks = []
        for module in model.modules():
            # torch's own leaves (linear, norm, embedding) call no attention; hooks on them would only cost time.
            if _may_call_attention(module):
                self._hooks += [
                    module.register_forward_pre_hook(_enter),
                    module.register_forward_hook(_leave, always_call=True),
                ]
        self._removed = False

    def remove(self) -> None:
        """Puts everything back; a second call does nothing."""
        if self._removed:
            return
        self._removed = True
        for hook in self._hooks:
            hook.remove()
        _restore(self._names)

    def __enter__(self) -> Acceleration:
        if self._removed:
            raise RuntimeError("accelerate: this handle was removed; call accelerate(model) again")
        _depth.value += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _depth.value -= 1
        self.remove()


def accelerate(model: nn.Module) -> Acceleration:
    """Gives ``model`` an attention that can be differentiated twice, without changing the model.

    As a context manager, it accelerates everything that this thread computes inside::

        with metafast.accelerate(model):
            loss = model(x).sum()
            grads = torch.autograd.grad(loss, params, create_graph=True)

    As a handle, it accelerates calls of the model and of its parts, in every thread, until ``handle.remove()``. Both nest.
    Whether the fused or the reference path of attention runs is decided as for any op (see :class:`metafast.use_backend`).

    Torch's inference kernels for Transformers have no derivatives and stay off meanwhile, in evaluation mode too. Torch's
    kernels write zeros at padded positions; the accelerated model does not. All other positions are equal.

    Args:
        model: any module that calls ``scaled_dot_product_attention``: directly, through ``nn.MultiheadAttention`` and
            the ``nn.Transformer`` classes, or through Hugging Face's ``attn_implementation="sdpa"``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return Acceleration(model)


@contextlib.contextmanager
def accelerated_thread(names: Names) -> Iterator[None]:
    """``with accelerate(model)`` for a caller that runs the model in this thread alone, without hooks on it."""
    _replace(names)
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1
        _restore(names)


def _may_call_attention(module: nn.Module) -> bool:
    return any(True for _ in module.children()) or not type(module).__module__.startswith("torch.nn.")


def _enter(*_: Any) -> None:
    _depth.value += 1


def _leave(*_: Any) -> None:
    _depth.value -= 1


def is_own_hook(hook: Any) -> bool:
    """Whether a forward hook of a module is one of :func:`accelerate`'s."""
    return hook is _enter or hook is _leave
