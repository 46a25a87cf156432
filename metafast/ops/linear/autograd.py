"""The batching rule. Beneath it are torch's own products, so derivatives of any order are torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast.ops.functions import Function, is_forward_over_forward, save

_torch_linear = torch.nn.functional.linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, for ``torch.func.vmap`` over weights of several tasks.

    Args:
        input: ``[*, in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.

    Returns:
        ``[*, out]``.
    """
    if weight.ndim != 2 or not torch._C._are_functorch_transforms_active() or is_forward_over_forward():
        return _torch_linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _Linear(Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _torch_linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        input, weight, bias = inputs
        ctx.has_bias = bias is not None
        save(ctx, input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        input, weight = ctx.saved_tensors
        rows, inputs = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        return grad @ weight, rows.mT @ inputs, rows.sum(0) if ctx.has_bias else None

    @staticmethod
    def jvp(ctx: Any, input_tangent: Tensor, weight_tangent: Tensor, bias_tangent: Tensor | None) -> Tensor:
        input, weight = ctx.saved_tensors
        return _torch_linear(input_tangent, weight) + _torch_linear(input, weight_tangent, bias_tangent)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        input_dim, weight_dim, bias_dim = in_dims
        if input_dim is not None:
            input = input.movedim(input_dim, 0)
        if weight_dim is None and bias_dim is None:
            return linear(input, weight, bias), 0
        tasks = info.batch_size
        if input_dim is None:
            input = input.expand(tasks, *input.shape)
        weight = weight.expand(tasks, *weight.shape) if weight_dim is None else weight.movedim(weight_dim, 0)
        rows = input.reshape(tasks, -1, input.shape[-1])
        if bias is None:
            out = torch.bmm(rows, weight.mT)
        else:
            bias = bias.expand(tasks, *bias.shape) if bias_dim is None else bias.movedim(bias_dim, 0)
            out = torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
        return out.reshape(*input.shape[:-1], out.shape[-1]), 0
