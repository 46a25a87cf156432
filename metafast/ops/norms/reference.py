"""Normalisations of channels in plain PyTorch, differentiable to any order; ``input`` is ``[B, C, *]``."""

from __future__ import annotations

from torch import Tensor

from metafast.ops.layer_norm.reference import normalised, scaled


def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normal = normalised(input, (0, *range(2, input.ndim)), eps)
    return _scaled(normal, weight, bias).to(input.dtype)


def instance_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normal = normalised(input, tuple(range(2, input.ndim)), eps)
    return _scaled(normal, weight, bias).to(input.dtype)


def group_norm(input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normal = normalised(input.reshape(input.shape[0], groups, -1), (2,), eps).reshape(input.shape)
    return _scaled(normal, weight, bias).to(input.dtype)


def _scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    beside = (-1, *(1,) * (normal.ndim - 2))
    return scaled(normal, *(None if x is None else x.reshape(beside) for x in (weight, bias)))
