"""What the ops' autograd Functions share."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from metafast.backend import extension, requested_backend

F = TypeVar("F", bound=type[Function])


def with_signature(function: F) -> F:
    """Class decorator: keeps ``forward``'s signature, which ``Function.apply`` asks for in every call.

    Working it out anew takes longer than a small kernel.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def batched(
    info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...], unexpanded: tuple[int, ...] = ()
) -> list[Any]:
    """A vmap rule's inputs with the batch dimension first, in tensors that have none expanded.

    Args:
        info, in_dims, inputs: as ``Function.vmap`` gets them.
        unexpanded: positions of tensors that get a dimension of 1 instead, if all of them are the same for the batch.
    """
    if any(in_dims[position] is not None for position in unexpanded):
        unexpanded = ()
    return [
        value
        if not isinstance(value, Tensor)
        else value.movedim(dim, 0)
        if dim is not None
        else value[None]
        if position in unexpanded
        else value.expand(info.batch_size, *value.shape)
        for position, (value, dim) in enumerate(zip(inputs, in_dims, strict=True))
    ]


def all_batched(outputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What a vmap rule returns of outputs whose first dimension is the batch."""
    return outputs, (0,) * len(outputs)


def is_forward_over_forward() -> bool:
    """Whether forward mode is being taken inside forward mode (``jacfwd(jacfwd(f))``).

    Torch differentiates what a Function's ``jvp`` computes as if it were constant there: the result is wrong, silently.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def has_cpu_kernels(*tensors: Tensor) -> bool:
    """Whether the small ops that only ``accelerate`` swaps in run their kernels on these tensors, and torch's own elsewhere.

    float32 or float64, one dtype, on the CPU, with the extension loaded, and the reference backend not asked for. Nor does
    forward mode over forward mode run them.
    """
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors)
        and not torch.compiler.is_compiling()
        and requested_backend() != "reference"
        and not is_forward_over_forward()
        and extension() is not None
    )
