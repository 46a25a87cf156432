"""The ops as torch's dispatcher knows them: schemas, shapes without data, kernels a device, first-order autograd.

The CPU kernels register themselves when the extension loads (``csrc/cpu/attention/ops.cpp``). The schemas are here and not
in the extension, so that Triton's kernels need no compiled extension. Autograd is registered for ``torch.compile``,
which cannot trace the Functions of ``autograd.py``; eager calls and ``torch.func`` go through those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafast.backend import constant_when_compiled, extension
from metafast.ops.attention.options import COUNT, SCHEMA, from_op, to_op
from metafast.ops.schemas import define_with_out

_library = torch.library.Library("metafast", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value"
_SAVED = f"{_INPUTS}, Tensor out, Tensor statistics"
_TANGENTS = "Tensor tangent_query, Tensor tangent_key, Tensor tangent_value, Tensor? tangent_mask"
_SECOND = f"Tensor grad_out, {_SAVED}, {_TANGENTS}, Tensor? tangent_grad_out, {SCHEMA}"

for _schema in (
    f"attention_forward({_INPUTS}, {SCHEMA}) -> (Tensor, Tensor)",
    f"attention_backward(Tensor grad_out, {_SAVED}, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
    f"attention_jvp({_SAVED}, {_TANGENTS}, {SCHEMA}) -> Tensor",
    f"attention_backward_jvp({_SECOND}) -> (Tensor, Tensor, Tensor, Tensor)",
    f"attention_mask_backward(Tensor grad_out, {_SAVED}, {SCHEMA}) -> Tensor",
    f"attention_mask_backward_jvp({_SECOND}) -> Tensor",
):
    define_with_out(_library, _schema, tags=(torch.Tag.pt2_compliant_tag,))


@constant_when_compiled
def load_kernels() -> bool:
    """Makes the CPU kernels known to the dispatcher, where the extension loads; Triton's are registered below."""
    return extension() is not None


def _has_plain_rows(tensor: Tensor) -> bool:
    return (tensor.shape[-1] == 1 or tensor.stride(-1) == 1) and (
        tensor.shape[-2] == 1 or tensor.stride(-2) >= tensor.shape[-1]
    )


def _output_like(tensor: Tensor, columns: int | None = None) -> Tensor:
    """Shape, dtype and memory order of a kernel's output, as ``output_like`` in csrc/cpu/attention/call.h."""
    columns = tensor.shape[-1] if columns is None else columns
    if tensor.shape[-1] == columns:
        output = torch.empty_like(tensor if _has_plain_rows(tensor) else tensor.contiguous())
        if _has_plain_rows(output):
            return output
    return tensor.new_empty((*tensor.shape[:-1], columns))


@torch.library.register_fake("metafast::attention_forward", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    statistic = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _output_like(query, value.shape[-1]), query.new_empty((*query.shape[:-1], 2), dtype=statistic)


@torch.library.register_fake("metafast::attention_backward", lib=_library)
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _output_like(query), _output_like(key), _output_like(value)


@torch.library.register_fake("metafast::attention_jvp", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, out: Tensor, *rest: Any) -> Tensor:
    return _output_like(out)


@torch.library.register_fake("metafast::attention_backward_jvp", lib=_library)
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _output_like(out), _output_like(query), _output_like(key), _output_like(value)


@torch.library.register_fake("metafast::attention_mask_backward", lib=_library)
@torch.library.register_fake("metafast::attention_mask_backward_jvp", lib=_library)
def _(*arguments: Any) -> Tensor:
    attn_mask: Tensor = arguments[-COUNT]
    return attn_mask.new_empty(attn_mask.shape)


def _triton(name: str) -> Callable[..., Any]:
    """The function of that name in ``triton/``, which is imported at the first call."""

    def kernel(*arguments: Any) -> Any:
        from metafast.ops.attention import triton

        tensors, told = from_op(arguments)
        return getattr(triton, name)(*tensors, *told)

    return kernel


for _name in ("forward", "backward", "jvp", "backward_jvp", "mask_backward", "mask_backward_jvp"):
    _library.impl(f"attention_{_name}", _triton(_name), "CUDA")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, (*tensors, ctx.options) = from_op(inputs)
    ctx.save_for_backward(*qkv, *output, *tensors)


def _backward(ctx: Any, grad_out: Tensor, grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (grad_out, *to_op((*ctx.saved_tensors, ctx.options)))
    grads = torch.ops.metafast.attention_backward(*arguments)
    grad_mask = torch.ops.metafast.attention_mask_backward(*arguments) if ctx.needs_input_grad[3] else None
    return (*grads, grad_mask, *(None,) * (COUNT - 1))


torch.library.register_autograd("metafast::attention_forward", _backward, setup_context=_setup_context, lib=_library)
