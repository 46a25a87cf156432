"""How attention is differentiated: three Functions over the four ops of ``library.py``.

``Attention`` is differentiated by ``AttentionBackward`` and ``AttentionJvp``, and each of these by
``AttentionBackwardJvp``: the double backward of attention is the JVP of its backward in the direction of the incoming
cotangents (README.md). ``out`` and ``lse`` are handed on as saved numbers; derivatives by query, key and value are total
ones, through both. The third derivative raises.

Plain Functions compose under ``torch.func`` where ops with ``register_autograd`` do not (a ``jvp`` of those is silently
zero), and inside ``torch.compile`` it is the other way round; so compiled code gets the op itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from metafast.ops.attention.library import load_kernels
from metafast.ops.functions import with_signature

_ops = torch.ops.metafast


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Fused attention of checked arguments: leading dimensions equal, ``attn_mask`` expanded."""
    load_kernels()
    if torch.compiler.is_compiling():
        return _ops.attention_forward(query, key, value, attn_mask, is_causal, scale)[0]
    return Attention.apply(query, key, value, attn_mask, is_causal, scale)[0]


@with_signature
class Attention(Function):
    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.attention_forward(query, key, value, attn_mask, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, attn_mask, ctx.is_causal, ctx.scale = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        _save(ctx, query, key, value, out, lse, attn_mask)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        *saved, attn_mask = ctx.saved_tensors
        grads = AttentionBackward.apply(grad_out, *saved, attn_mask, ctx.is_causal, ctx.scale)
        return (*grads, None, None, None)

    @staticmethod
    def jvp(
        ctx: Any, tangent_query: Tensor, tangent_key: Tensor, tangent_value: Tensor, *_: None
    ) -> tuple[Tensor, None]:
        *saved, attn_mask = ctx.saved_tensors
        tangents = (tangent_query, tangent_key, tangent_value)
        return AttentionJvp.apply(*saved, *tangents, attn_mask, ctx.is_causal, ctx.scale), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return Attention.apply(*_batched(info, in_dims, inputs)), (0, 0)


@with_signature
class AttentionBackward(Function):
    @staticmethod
    def forward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.attention_backward(grad_out, query, key, value, out, lse, attn_mask, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.is_causal, ctx.scale = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(
        ctx: Any, tangent_query: Tensor, tangent_key: Tensor, tangent_value: Tensor
    ) -> tuple[Tensor | None, ...]:
        *saved, attn_mask = ctx.saved_tensors
        tangents = (tangent_query, tangent_key, tangent_value)
        grads = AttentionBackwardJvp.apply(*saved, *tangents, None, attn_mask, ctx.is_causal, ctx.scale)
        return (*grads, None, None, None, None, None)

    @staticmethod
    def jvp(
        ctx: Any, tangent_grad_out: Tensor, tangent_query: Tensor, tangent_key: Tensor, tangent_value: Tensor, *_: Any
    ) -> tuple[Tensor, ...]:
        *saved, attn_mask = ctx.saved_tensors
        tangents = (tangent_query, tangent_key, tangent_value, tangent_grad_out)
        return AttentionBackwardJvp.apply(*saved, *tangents, attn_mask, ctx.is_causal, ctx.scale)[1:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return AttentionBackward.apply(*_batched(info, in_dims, inputs)), (0, 0, 0)


@with_signature
class AttentionJvp(Function):
    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        tangent_query: Tensor,
        tangent_key: Tensor,
        tangent_value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        tangents = (tangent_query, tangent_key, tangent_value)
        return _ops.attention_jvp(query, key, value, out, lse, *tangents, attn_mask, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.is_causal, ctx.scale = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_tangent: Tensor) -> tuple[Tensor | None, ...]:
        # <grad_tangent, J t> is linear in the directions t, so their gradient is the ordinary backward; by query, key
        # and value it is the derivative of that backward in the directions t.
        query, key, value, out, lse, *tangents, attn_mask = ctx.saved_tensors
        saved = (grad_tangent, query, key, value, out, lse)
        options = (attn_mask, ctx.is_causal, ctx.scale)
        by_tangents = AttentionBackward.apply(*saved, *options)
        by_inputs = AttentionBackwardJvp.apply(*saved, *tangents, None, *options)[1:]
        return (*by_inputs, None, None, *by_tangents, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(
            "metafast attention: forward mode over forward mode has no fused kernel; take the inner derivative in "
            'reverse mode (torch.func.grad, vjp), or use backend="reference"'
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return AttentionJvp.apply(*_batched(info, in_dims, inputs)), 0


@with_signature
class AttentionBackwardJvp(Function):
    @staticmethod
    def forward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        tangent_query: Tensor,
        tangent_key: Tensor,
        tangent_value: Tensor,
        tangent_grad_out: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tangents = (tangent_query, tangent_key, tangent_value, tangent_grad_out)
        return _ops.attention_backward_jvp(
            grad_out, query, key, value, out, lse, *tangents, attn_mask, is_causal, scale
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        _raise_third_order()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        _raise_third_order()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return AttentionBackwardJvp.apply(*_batched(info, in_dims, inputs)), (0, 0, 0, 0)


def _raise_third_order() -> None:
    raise NotImplementedError(
        'metafast attention: the fused path is differentiable twice; for a third derivative use backend="reference"'
    )


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _batched(info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """The inputs with vmap's dimension first: one more leading dimension, which the kernels take in any number."""
    return [
        value
        if not isinstance(value, Tensor)
        else value.expand(info.batch_size, *value.shape)
        if dim is None
        else value.movedim(dim, 0)
        for value, dim in zip(inputs, in_dims, strict=True)
    ]
