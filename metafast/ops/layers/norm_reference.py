"""Normalisations in plain PyTorch, and the derivatives of layer normalisation; formulas in README.md.

All of it is differentiable to any order. In the derivatives ``input`` is ``[*tasks, *, C]`` where tasks stand side by side,
and ``weight`` and ``bias`` are ``[*tasks, C]``, with as many leading dimensions as there are kinds of tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(input: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``torch.layer_norm`` over the last ``dims`` dimensions of one task, in float32 where the input is of a half type."""
    normal = normalised(input, tuple(range(-dims, 0)), eps)
    return scaled(normal, weight, bias).to(input.dtype)


def rms_norm(input: Tensor, dims: int, weight: Tensor | None, eps: float | None) -> Tensor:
    """``torch.rms_norm`` over the last ``dims`` dimensions, in float32 where the input is of a half type."""
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    if eps is None:
        eps = torch.finfo(wide.dtype).eps
    normal = wide * torch.rsqrt(wide.square().mean(tuple(range(-dims, 0)), keepdim=True) + eps)
    return (normal if weight is None else normal * weight).to(input.dtype)


def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Of ``[B, C, *]``, as are the other normalisations of channels."""
    normal = normalised(input, (0, *range(2, input.ndim)), eps)
    return _scaled_channels(normal, weight, bias).to(input.dtype)


def instance_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normal = normalised(input, tuple(range(2, input.ndim)), eps)
    return _scaled_channels(normal, weight, bias).to(input.dtype)


def group_norm(input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normal = normalised(input.reshape(input.shape[0], groups, -1), (2,), eps).reshape(input.shape)
    return _scaled_channels(normal, weight, bias).to(input.dtype)


def normalised(input: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """``input`` with mean 0 and variance 1 over ``dims``, in float32 at least."""
    input = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = input - input.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``normal * weight + bias``, of what is given."""
    if weight is not None:
        normal = normal * weight
    return normal if bias is None else normal + bias


def forward(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    normal, _ = _normalised(input, eps)
    return normal * beside(weight, input) + beside(bias, input)


def backward(grad: Tensor, input: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by input, weight and bias."""
    normal, rstd = _normalised(input, eps)
    return _input_gradient(grad * beside(weight, input), normal, rstd), _sum(grad * normal, weight), _sum(grad, weight)


def jvp(
    input: Tensor, weight: Tensor, eps: float, tangent_input: Tensor, tangent_weight: Tensor, tangent_bias: Tensor
) -> Tensor:
    """The tangent of the output."""
    normal, rstd = _normalised(input, eps)
    tangent_normal = _input_gradient(tangent_input, normal, rstd)
    scaled = tangent_normal * beside(weight, input) + normal * beside(tangent_weight, input)
    return scaled + beside(tangent_bias, input)


def backward_jvp(
    grad: Tensor, input: Tensor, weight: Tensor, eps: float, tangent_input: Tensor, tangent_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Tangents of the gradients by input and weight, with ``grad`` held fixed."""
    normal, rstd = _normalised(input, eps)
    tangent_normal = _input_gradient(tangent_input, normal, rstd)
    weighted, tangent_weighted = grad * beside(weight, input), grad * beside(tangent_weight, input)
    share = _mean(tangent_weighted * normal) + _mean(weighted * tangent_normal)
    inner = tangent_weighted - _mean(tangent_weighted) - tangent_normal * _mean(weighted * normal) - normal * share
    by_input = rstd * inner - rstd * _mean(tangent_input * normal) * _input_gradient(weighted, normal, rstd)
    return by_input, _sum(grad * tangent_normal, weight)


def beside(weight: Tensor, input: Tensor) -> Tensor:
    """A weight of each task, broadcast over the task's rows."""
    return weight.reshape(*weight.shape[:-1], *(1,) * (input.ndim - weight.ndim), weight.shape[-1])


def _scaled_channels(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    beside = (-1, *(1,) * (normal.ndim - 2))
    return scaled(normal, *(None if x is None else x.reshape(beside) for x in (weight, bias)))


def _normalised(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(input.var(-1, unbiased=False, keepdim=True) + eps)
    return (input - _mean(input)) * rstd, rstd


def _input_gradient(weighted: Tensor, normal: Tensor, rstd: Tensor) -> Tensor:
    return rstd * (weighted - _mean(weighted) - normal * _mean(weighted * normal))


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _sum(x: Tensor, weight: Tensor) -> Tensor:
    rows = range(weight.ndim - 1, x.ndim - 1)
    return x.sum(tuple(rows)) if rows else x
