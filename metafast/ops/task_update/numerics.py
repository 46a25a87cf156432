"""What the formulas in plain PyTorch share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["master", "root"]


def master(tensor: Tensor) -> Tensor:
    """The tensor in the type of the arithmetic: half types are computed in float32, as the kernels do."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def root(square: Tensor) -> Tensor:
    """The square root, with derivatives 0 of every order where it is 0; below 0, by rounding, it is taken as 0."""
    zero = square <= 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())
