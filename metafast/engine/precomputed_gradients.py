"""Values whose gradients were computed already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def with_precomputed_gradients(values: Tensor, gradients: Sequence[Tensor | None], params: list[Tensor]) -> Tensor:
    """``values`` as a function of ``params`` with given derivatives.

    Args:
        values: of any shape, ``[]`` or ``[T]``.
        gradients: for each of ``params`` the derivatives of all values, ``[*values.shape, *param.shape]``, or None.
        params: what gets the gradients.
    """
    return _PrecomputedGradients.apply(values.detach(), gradients, *params)


class _PrecomputedGradients(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, gradients: Sequence[Tensor | None], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (
            None,
            None,
            *(None if g is None else _product(grad.to(g.dtype), g) for g in ctx.gradients),
        )


def _product(grad: Tensor, derivatives: Tensor) -> Tensor:
    """Σ over the values, of which there may be one: then a multiplication, many times faster for small tensors."""
    return grad * derivatives if grad.ndim == 0 else torch.tensordot(grad, derivatives, grad.ndim)
