"""``torch.layer_norm`` with weights of each task's own, and a double backward that is one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metafast.ops.functions import Function, all_batched, batched, is_forward_mode, save
from metafast.ops.layers import library as _library  # noqa: F401 - defines the ops
from metafast.ops.layers import norm_reference as reference
from metafast.ops.layers.kernels import runs_kernels

_torch_layer_norm = torch.layer_norm
_ops = torch.ops.metafast


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``torch.layer_norm``; in forward mode without torch's own derivative, which is wrong there (pytorch#196700).

    Args:
        input: ``[*, *normalized_shape]``.
        normalized_shape: sizes of the last dimensions, over which it is normalised.
        weight, bias: ``[*normalized_shape]`` or None.
        eps: added to the variance.
        cudnn_enable: as torch's.
    """
    shape = tuple(normalized_shape)
    given = [tensor for tensor in (weight, bias) if tensor is not None]
    size = math.prod(shape)
    fits = shape and tuple(input.shape[-len(shape) :]) == shape and all(tuple(x.shape) == shape for x in given)
    if fits and size > 0:
        if runs_kernels("layer_norm", input, *given):
            scale, offset = (
                torch.full((size,), default, dtype=input.dtype) if tensor is None else tensor.reshape(size)
                for tensor, default in ((weight, 1.0), (bias, 0.0))
            )
            out: Tensor = _LayerNorm.apply(input.flatten(-len(shape)), scale, offset, eps)[0]
            return out.reshape(input.shape)
        if is_forward_mode():
            return reference.layer_norm(input, len(shape), weight, bias, eps)
        if weight is None and bias is not None:
            # Torch does not differentiate this twice as one call.
            return _torch_layer_norm(input, normalized_shape, None, None, eps, cudnn_enable) + bias
    return _torch_layer_norm(input, normalized_shape, weight, bias, eps, cudnn_enable)


class _LayerNorm(Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, statistics = _ops.layer_norm_forward(_rows(input, weight), _weights(weight), _weights(bias), eps)
        return out.view(input.shape), statistics.view(*input.shape[:-1], 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, _, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        save(ctx, input, weight, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
        return (*_LayerNormBackward.apply(grad, *ctx.saved_tensors, ctx.eps), None)

    @staticmethod
    def jvp(
        ctx: Any, tangent_input: Tensor, tangent_weight: Tensor, tangent_bias: Tensor, *_: None
    ) -> tuple[Tensor, None]:
        input, weight, _statistics = ctx.saved_tensors
        return reference.jvp(input, weight, ctx.eps, tangent_input, tangent_weight, tangent_bias), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return all_batched(_LayerNorm.apply(*batched(info, in_dims, inputs)))


class _LayerNormBackward(Function):
    @staticmethod
    def forward(
        grad: Tensor, input: Tensor, weight: Tensor, statistics: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = (_rows(grad, weight), _rows(input, weight), _weights(weight), _rows(statistics, weight))
        grads = _ops.layer_norm_backward(*rows)
        return grads[0].view(input.shape), grads[1].view(weight.shape), grads[2].view(weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(
        ctx: Any, tangent_input: Tensor, tangent_weight: Tensor, tangent_bias: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad, input, weight, statistics = ctx.saved_tensors
        # Whoever records this may ask for a third derivative, which the kernel has not.
        if torch.is_grad_enabled():
            tangent_out = reference.jvp(input, weight, ctx.eps, tangent_input, tangent_weight, tangent_bias)
            seconds = reference.backward_jvp(grad, input, weight, ctx.eps, tangent_input, tangent_weight)
            return (tangent_out, *seconds, None, None)
        rows = (_rows(grad, weight), _rows(input, weight), _weights(weight), _rows(statistics, weight))
        tangents = (_rows(tangent_input, weight), _weights(tangent_weight), _weights(tangent_bias))
        out, by_input, by_weight = _ops.layer_norm_backward_jvp(*rows, *tangents)
        return out.view(input.shape), by_input.view(input.shape), by_weight.view(weight.shape), None, None

    @staticmethod
    def jvp(
        ctx: Any, tangent_grad: Tensor, tangent_input: Tensor, tangent_weight: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, input, weight, _statistics = ctx.saved_tensors
        linear = reference.backward(tangent_grad, input, weight, ctx.eps)
        by_input, by_weight = reference.backward_jvp(grad, input, weight, ctx.eps, tangent_input, tangent_weight)
        return linear[0] + by_input, linear[1] + by_weight, linear[2]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return all_batched(_LayerNormBackward.apply(*batched(info, in_dims, inputs)))


def _rows(tensor: Tensor, weight: Tensor) -> Tensor:
    """``[*tasks, *, n]`` as the kernels take it: ``[T, R, n]``."""
    lead = weight.ndim - 1
    return tensor.reshape(math.prod(weight.shape[:-1]), math.prod(tensor.shape[lead:-1]), tensor.shape[-1])


def _weights(weight: Tensor) -> Tensor:
    """``[*tasks, C]`` as the kernels take it: ``[T, C]``."""
    return weight.reshape(math.prod(weight.shape[:-1]), weight.shape[-1])
