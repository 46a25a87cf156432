"""What the ops' autograd Functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast.ops import torch_internals as internals

_RANDOMNESS = {getattr(internals.RandomnessType, name.capitalize()): name for name in ("error", "same", "different")}


class Function(torch.autograd.Function):
    """Base of the ops' autograd Functions: ``apply`` without what torch spends on a call, more than a small kernel takes.

    Torch binds the arguments to ``forward``'s signature anew, and under vmap passes them through a higher-order operator and
    several pytrees. Here inputs are positional and complete, tensors are not nested in them, and no output is an input.
    """

    @classmethod
    def apply(cls, *inputs: Any) -> Any:
        if not internals.are_transforms_active():
            # Tensors that a finished transform had wrapped are dead wrappers, which only the dispatcher sees through.
            return super(torch.autograd.Function, cls).apply(  # type: ignore[misc]
                *(internals.unwrap_if_dead(value) if isinstance(value, Tensor) else value for value in inputs)
            )
        top = internals.innermost_transform()
        if top.level() > 1 or top.key() != internals.TransformType.Vmap:
            return super().apply(*inputs)
        return _batched_apply(cls, internals.VmapTransform(top), inputs)


def _batched_apply(function: type[Function], vmap: Any, inputs: tuple[Any, ...]) -> Any:
    """``function.apply`` under one vmap and nothing else."""
    pairs = [internals.unwrap_batched(value, 1) if isinstance(value, Tensor) else (value, None) for value in inputs]
    values, in_dims = zip(*pairs, strict=True)
    info = internals.VmapInfo(vmap.batchSize(), _RANDOMNESS[vmap.randomness()])
    layer = internals.leave_transform()
    try:
        if all(dim is None for dim in in_dims):
            return function.apply(*values)
        outputs, out_dims = function.vmap(info, in_dims, *values)
    finally:
        internals.enter_transform(layer)
    if isinstance(outputs, Tensor):
        return internals.wrap_batched(outputs, out_dims, 1)
    return tuple(
        internals.wrap_batched(output, dim, 1) if isinstance(output, Tensor) and dim is not None else output
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
    if not internals.are_transforms_active():
        return False
    stack = internals.transforms() or ()
    return sum(level.key() == internals.TransformType.Jvp for level in stack) > 1


def is_forward_mode() -> bool:
    """Whether forward mode is entered, by ``torch.func.jvp`` or by ``torch.autograd.forward_ad``."""
    return internals.forward_mode_level() >= 0
