"""What the ops' autograd Functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo

from metafast.backend import extension, requested_backend

_functorch = torch._C._functorch
_RANDOMNESS = {getattr(_functorch.RandomnessType, name.capitalize()): name for name in ("error", "same", "different")}


class Function(torch.autograd.Function):
    """Base of the ops' autograd Functions: ``apply`` without what torch spends on a call, more than a small kernel takes.

    Torch binds the arguments to ``forward``'s signature anew, and under vmap passes them through a higher-order operator and
    several pytrees. Here inputs are positional and complete, tensors are not nested in them, and no output is an input.
    """

    @classmethod
    def apply(cls, *inputs: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            # Tensors that a finished transform had wrapped are dead wrappers, which only the dispatcher sees through.
            return super(torch.autograd.Function, cls).apply(  # type: ignore[misc]
                *(_functorch.unwrap_if_dead(value) if isinstance(value, Tensor) else value for value in inputs)
            )
        top = _functorch.peek_interpreter_stack()
        if top.level() > 1 or top.key() != _functorch.TransformType.Vmap:
            return super().apply(*inputs)
        return _batched_apply(cls, _functorch.CVmapInterpreterPtr(top), inputs)


def _batched_apply(function: type[Function], vmap: Any, inputs: tuple[Any, ...]) -> Any:
    """``function.apply`` under one vmap and nothing else."""
    pairs = [_functorch._unwrap_batched(value, 1) if isinstance(value, Tensor) else (value, None) for value in inputs]
    values, in_dims = zip(*pairs, strict=True)
    info = VmapInfo(vmap.batchSize(), _RANDOMNESS[vmap.randomness()])
    layer = _functorch.pop_dynamic_layer_stack()
    try:
        if all(dim is None for dim in in_dims):
            return function.apply(*values)
        outputs, out_dims = function.vmap(info, in_dims, *values)
    finally:
        _functorch.push_dynamic_layer_stack(layer)
    if isinstance(outputs, Tensor):
        return _functorch._add_batch_dim(outputs, out_dims, 1)
    return tuple(
        _functorch._add_batch_dim(output, dim, 1) if isinstance(output, Tensor) and dim is not None else output
        for output, dim in zip(outputs, out_dims, strict=True)
    )


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keeps ``tensors`` for both modes of differentiation."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


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
    stack = _functorch.get_interpreter_stack() or ()
    return sum(level.key() == _functorch.TransformType.Jvp for level in stack) > 1


def is_forward_mode() -> bool:
    """Whether forward mode is entered, by ``torch.func.jvp`` or by ``torch.autograd.forward_ad``."""
    return torch.autograd.forward_ad._current_level >= 0


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
