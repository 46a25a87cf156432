"""Clipping of the inner gradients, in plain PyTorch: differentiable to any order, one pass to read and one to scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metafast.ops.task_update.numerics import master, root

__all__ = ["clipped"]

EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def clipped(grads: Sequence[Tensor], norm: float | None, value: float | None) -> list[Tensor]:
    """The gradients of T tasks, clipped task by task.

    Args:
        grads: tensors ``[T, *shape]``.
        norm: the greatest 2-norm that a task's gradients, all tensors together, keep; None leaves them. As
            :func:`torch.nn.utils.clip_grad_norm_` has it: g · min(1, norm / (‖g‖ + 1e-6)). At ‖g‖ = 0 the factor is 1
            and its derivative 0.
        value: the greatest magnitude that an element keeps, afterwards; None leaves them. The derivative is 1 within
            and 0 beyond.
    """
    clipped = list(grads)
    if norm is not None:
        factor = (norm / (root(_squares(clipped)) + EPSILON)).clamp(max=1)
        clipped = [(master(g) * factor.to(master(g).dtype).view(-1, *[1] * (g.dim() - 1))).to(g.dtype) for g in clipped]
    if value is not None:
        clipped = [g.clamp(-value, value) for g in clipped]
    return clipped


def _squares(grads: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each task, over all tensors, in the widest type of the arithmetic."""
    sums = [master(g).square().flatten(1).sum(1) if g.dim() > 1 else master(g).square() for g in grads]
    widest = torch.float64 if any(s.dtype == torch.float64 for s in sums) else torch.float32
    return torch.stack([s.to(widest) for s in sums]).sum(0)
