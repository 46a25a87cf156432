"""``torch.nn.functional.linear`` for tasks side by side: a matrix product a task, however the rows of its input lie.

Under ``vmap`` over weights, torch multiplies every leading index of the input by a copy of the task's matrix and adds the
bias afterwards. A task's rows all meet the same matrix, so they are one matrix, and the bias rides on the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metafast.ops.functions import Function, is_forward_over_forward, save
from metafast.ops.layers import products
from metafast.ops.torch_internals import are_transforms_active

_torch_linear = torch.nn.functional.linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, for ``torch.func.vmap`` over weights of several tasks, and for types that the CPU has no
    instructions for.

    Args:
        input: ``[*, in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.

    Returns:
        ``[*, out]``.
    """
    # Derivatives of complex numbers are conjugated, which ours are not.
    if weight.ndim != 2 or weight.is_complex() or input.is_complex() or is_forward_over_forward():
        return _torch_linear(input, weight, bias)
    if are_transforms_active():
        return _Linear.apply(input, weight, bias)
    rows, *others = (_as_autocast(tensor) for tensor in (input, weight, bias) if tensor is not None)
    if rows.ndim > 1 and products.are_slow(rows, *others):
        # As one task of many rows.
        rows = rows.reshape(1, math.prod(rows.shape[:-1]), rows.shape[-1])
        return _linear_of_tasks(rows, *(tensor[None] for tensor in others)).reshape(*input.shape[:-1], weight.shape[0])
    return _torch_linear(input, weight, bias)


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
        rows = input.reshape(tasks, math.prod(input.shape[1:-1]), input.shape[-1])
        if bias is not None:
            bias = bias.expand(tasks, *bias.shape) if bias_dim is None else bias.movedim(bias_dim, 0)
        out = _linear_of_tasks(rows, weight, bias)
        return out.reshape(*input.shape[:-1], out.shape[-1]), 0


def _linear_of_tasks(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.mT + bias`` for ``[T, rows, in]``, ``[T, out, in]`` and ``[T, out]``."""
    if are_transforms_active():
        return _product(rows, weight, bias)
    # Here, where autograd can still follow, and not beneath it: the Functions would see none of the casts.
    rows, weight = _as_autocast(rows), _as_autocast(weight)
    return _TasksLinear.apply(rows, weight, None if bias is None else _as_autocast(bias))


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = products.total(None if bias is None else bias.unsqueeze(1), (rows, weight.mT))
    assert product is not None
    return product


def _as_autocast(tensor: Tensor) -> Tensor:
    """As autocast would hand it to a matrix product."""
    kind = tensor.device.type
    if (
        tensor.dtype == torch.float64
        or not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
    ):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


class _TasksLinear(Function):
    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(rows, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        save(ctx, *inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        if are_transforms_active():
            # A batch of gradients.
            return _gradients(grad, rows, weight, ctx.needs_input_grad)
        return _TasksLinearBackward.apply(grad, rows, weight, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, rows_tangent: Tensor, weight_tangent: Tensor, bias_tangent: Tensor | None) -> Tensor | None:
        rows, weight = ctx.saved_tensors
        start = None if bias_tangent is None else bias_tangent.unsqueeze(1)
        return products.total(start, (rows_tangent, weight.mT), (rows, weight_tangent.mT))


class _TasksLinearBackward(Function):
    """The gradients as one operation: what the product before it hears back from all of them is one sum of products then,
    where torch would form each and add them up."""

    @staticmethod
    def forward(grad: Tensor, rows: Tensor, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        return _gradients(grad, rows, weight, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, *inputs[:3])

    @staticmethod
    def backward(
        ctx: Any, by_rows: Tensor | None, by_weight: Tensor | None, by_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad, rows, weight = ctx.saved_tensors
        start = None if by_bias is None else by_bias.unsqueeze(1).expand_as(grad)
        pairs = ((by_rows, weight.mT), (rows, None if by_weight is None else by_weight.mT))
        return (
            products.total(start, *pairs) if ctx.needs_input_grad[0] else None,
            products.total(None, (grad, by_weight)) if ctx.needs_input_grad[1] else None,
            products.product(grad.mT, by_rows) if by_rows is not None and ctx.needs_input_grad[2] else None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any, by_grad: Tensor | None, by_rows: Tensor | None, by_weight: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        grad, rows, weight = ctx.saved_tensors
        return (
            products.total(None, (by_grad, weight), (grad, by_weight)),
            products.total(None, (None if by_grad is None else by_grad.mT, rows), (grad.mT, by_rows)),
            None if by_grad is None else by_grad.sum(1),
        )


def _gradients(grad: Tensor, rows: Tensor, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return (
        products.total(None, (grad, weight)) if needed[0] else None,
        products.product(grad.mT, rows) if needed[1] else None,
        grad.sum(1) if needed[2] else None,
    )
