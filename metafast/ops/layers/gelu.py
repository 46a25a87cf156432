"""``torch.nn.functional.gelu`` whose double backward is one pass over memory, where torch composes it of a dozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast.ops.functions import Function, batched, save
from metafast.ops.layers import library as _library  # noqa: F401 - defines the ops
from metafast.ops.layers.gelu_reference import first_derivative, second_derivative
from metafast.ops.layers.kernels import runs_kernels

_torch_gelu = torch.nn.functional.gelu


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``.

    Args:
        input: any shape.
        approximate: ``"none"`` or, by torch's own op, ``"tanh"``.
    """
    if approximate != "none" or not runs_kernels("gelu", input):
        return _torch_gelu(input, approximate=approximate)
    return _Gelu.apply(input)


class _Gelu(Function):
    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return _torch_gelu(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _GeluBackward.apply(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        return tangent * first_derivative(input)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], input: Tensor) -> tuple[Tensor, int | None]:
        return _Gelu.apply(input), in_dims[0]


class _GeluBackward(Function):
    @staticmethod
    def forward(grad: Tensor, input: Tensor) -> Tensor:
        return torch.ops.metafast.gelu_backward(grad, input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        grad, input = ctx.saved_tensors
        # Whoever records this may ask for a third derivative, which the kernel has not.
        if torch.is_grad_enabled():
            return tangent * first_derivative(input), tangent * grad * second_derivative(input)
        return torch.ops.metafast.gelu_double_backward(grad, input, tangent)

    @staticmethod
    def jvp(ctx: Any, tangent_grad: Tensor, tangent_input: Tensor) -> Tensor:
        grad, input = ctx.saved_tensors
        return tangent_grad * first_derivative(input) + tangent_input * grad * second_derivative(input)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _GeluBackward.apply(*batched(info, in_dims, inputs)), 0
