"""Normalisation by the root mean square in plain PyTorch, differentiable to any order; formulas in README.md."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(input: Tensor, dims: int, weight: Tensor | None, eps: float | None) -> Tensor:
    """``torch.rms_norm`` over the last ``dims`` dimensions, in float32 where the input is of a half type."""
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    if eps is None:
        eps = torch.finfo(wide.dtype).eps
    normal = wide * torch.rsqrt(wide.square().mean(tuple(range(-dims, 0)), keepdim=True) + eps)
    return (normal if weight is None else normal * weight).to(input.dtype)
