"""Values whose gradients were computed already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from metafast.ops import torch_internals

# Of the derivative by the values, the values' derivatives, and what gets gradients: the gradients that these get.
Reduction: TypeAlias = Callable[[Tensor, Sequence[Tensor | None], Sequence[Tensor]], Sequence[Tensor | None]]


def multiplied(grad: Tensor, gradients: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the chain rule."""
    return [None if g is None else _product(grad.to(g.dtype), g) for g in gradients]


def with_precomputed_gradients(
    values: Tensor,
    gradients: Sequence[Tensor | None],
    params: list[Tensor],
    reduction: Reduction = multiplied,
    owned: Collection[int] = (),
) -> Tensor:
    """``values`` as a function of ``params`` with given derivatives.

    Args:
        values: of any shape, ``[]`` or ``[T]``.
        gradients: for each of ``params`` the derivatives of all values, ``[*values.shape, *param.shape]``, or None.
        params: what gets the gradients.
        reduction: makes gradients of derivatives in the backward pass.
        owned: positions of ``gradients`` whose memory nobody else reads. Where the graph is not kept and there is one value,
            it becomes that of the parameters' gradients.
    """
    return _PrecomputedGradients.apply(values.detach(), gradients, reduction, owned, *params)


class _PrecomputedGradients(Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        gradients: Sequence[Tensor | None],
        reduction: Reduction,
        owned: Collection[int],
        *params: Tensor,
    ) -> Tensor:
        ctx.gradients = gradients
        ctx.reduction = reduction
        ctx.owned = owned
        # Held by the graph anyway, which comes to them.
        ctx.params = params
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if grad.ndim == 0 and ctx.reduction is multiplied and not torch_internals.keeps_graph():
            # Held by nobody, so that a parameter without a gradient takes them as they are.
            ctx.gradients = None
            return None, None, None, None, *_handed_on(grad, gradients, ctx.owned)
        return None, None, None, None, *ctx.reduction(grad, gradients, ctx.params)


def _handed_on(grad: Tensor, gradients: Sequence[Tensor | None], owned: Collection[int]) -> list[Tensor | None]:
    """The gradients of the chain rule, written over those that are owned."""
    return [
        None if g is None else g.mul_(grad.to(g.dtype)) if index in owned else grad.to(g.dtype) * g
        for index, g in enumerate(gradients)
    ]


def _product(grad: Tensor, derivatives: Tensor) -> Tensor:
    """Σ over the values, of which there may be one: then a multiplication, many times faster for small tensors."""
    return grad * derivatives if grad.ndim == 0 else torch.tensordot(grad, derivatives, grad.ndim)
