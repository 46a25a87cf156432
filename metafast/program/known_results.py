"""Results without data of operations, computed once for arguments of the same forms.

Layers, inner steps and their derivatives run the same operations on tensors of the same forms again and again. torch keeps
results without data as well; asking it takes ten times as long.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from metafast.program.graph import Form, leaves

_lift = torch.ops.aten.lift_fresh_copy.default
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
# Operations of others may look at more than forms.
_NAMESPACES = ("aten", "metafast", "prims")


class _UnknownError(Exception):
    """An argument has more to it than its form."""


class KnownResults:
    """Computes operations on tensors without data.

    Args:
        mode: makes these tensors.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._values: dict[Any, Any] = {}

    def of(self, func: OpOverload, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The result of an operation, and its forms: see :class:`metafast.program.graph.Node`."""
        if not _depends_on_forms(func):
            result = func(*args, **kwargs)
            return result, _value(result)
        key: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        try:
            self._add(key, args)
            self._add(key, kwargs)
        except _UnknownError:
            result = func(*args, **kwargs)
            return result, _value(result)
        known = tuple(key)
        if known in self._values:
            value = self._values[known]
            return self._again(func, args, value), value
        result = func(*args, **kwargs)
        value = _value(result)
        if self._makes(func, args, kwargs, value, result):
            self._values[known] = value
        return result, value

    def _add(self, key: list[Any], value: Any) -> None:
        """Adds what results depend on to a key.

        Raises:
            _UnknownError: a tensor has data, belongs to another recording, or is no plain one.
        """
        kind = type(value)
        if kind is FakeTensor:
            if value.fake_mode is not self._mode or value.constant is not None or value.layout is not torch.strided:
                raise _UnknownError
            # Tensors without data answer these from C++.
            key += (
                kind,
                value.shape,
                value.stride(),
                value.storage_offset(),
                value.dtype,
                value.fake_device,
                value.requires_grad,
                value.is_inference(),
            )
            if value.is_conj() or value.is_neg() or value.is_quantized:
                raise _UnknownError
        elif kind is tuple or kind is list:
            key += (kind, len(value))
            for part in value:
                self._add(key, part)
        elif kind is dict:
            for name, part in value.items():
                key.append(name)
                self._add(key, part)
        elif isinstance(value, (Tensor, tuple, list, dict, torch.Generator, torch.ScriptObject)):
            raise _UnknownError
        else:
            # 1, 1.0 and True are equal.
            key += (kind, value)

    def _makes(self, func: OpOverload, args: Any, kwargs: Any, value: Any, result: Any) -> bool:
        """Whether forms are all there is to a result: made from them it is the same."""
        results = result if isinstance(result, tuple) else (result,)
        tensors = [tensor for tensor in results if tensor is not None]
        if not tensors or any(type(tensor) is not FakeTensor for tensor in tensors):
            return False
        if func.is_view and (len(tensors) != 1 or type(args[0]) is not FakeTensor):
            return False
        if any(tensor.constant is not None or tensor.requires_grad or tensor.is_quantized for tensor in tensors):
            return False
        memory = [_memory(tensor) for tensor in tensors]
        given = [_memory(tensor) for tensor in leaves(Tensor, (args, kwargs))]
        if func.is_view:
            if memory[0] != _memory(args[0]) or value.dtype != args[0].dtype:
                return False
        elif len({*memory, *given}) < len(memory) + len(set(given)):
            return False
        again = self._again(func, args, value)
        made = [tensor for tensor in (again if isinstance(again, tuple) else (again,)) if tensor is not None]
        return _value(again) == value and all(map(_is_alike, made, tensors))

    def _again(self, func: OpOverload, args: Any, value: Any) -> Any:
        """New tensors without data of the given forms; of a view, in the memory of its argument."""
        if isinstance(value, tuple):
            return tuple(None if form is None else self._again(func, args, form) for form in value)
        with in_kernel_invocation_manager(self._mode):
            if func.is_view:
                meta = torch.as_strided(args[0], value.shape, value.strides, value.offset)
            else:
                meta = torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device="meta")
        return FakeTensor(self._mode, meta, value.device)


@functools.cache
def _depends_on_forms(op: OpOverload) -> bool:
    """Whether nothing else than the forms of its arguments tells what an operation gives, and it changes nothing."""
    return (
        op.namespace in _NAMESPACES
        and not op._schema.is_mutable
        and op is not _lift
        and not _TAGS & set(op.tags)
        and not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    )


def _value(result: Any) -> Any:
    """The forms of the tensors in a result; None for everything else."""
    if isinstance(result, Tensor):
        return Form.of(result)
    if isinstance(result, (list, tuple)):
        value = [_value(part) for part in result]
        return value if isinstance(result, list) else tuple(value)
    return None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_alike(a: Tensor, b: Tensor) -> bool:
    """Whether torch treats two tensors without data alike."""
    keys = torch._C._dispatch_keys
    return keys(a) == keys(b) and a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
