"""How attention is differentiated: four Functions over the ops of ``library.py``.

``Attention`` is differentiated by ``AttentionBackward`` and ``AttentionJvp``, and each of these by
``AttentionBackwardJvp``: the double backward of attention is the JVP of its backward in the direction of the incoming
cotangents (README.md). ``out`` and ``statistics`` are handed on as saved numbers; derivatives by query, key, value and an
additive mask are total ones, through both. ``AttentionBackwardJvp`` is linear in its tangents, and differentiable by them;
the third derivative raises.

Plain Functions compose under ``torch.func`` where ops with ``register_autograd`` do not (a ``jvp`` of those is silently
zero), and inside ``torch.compile`` it is the other way round; so compiled code gets the op itself.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from metafast.ops.attention.library import load_kernels
from metafast.ops.functions import Function, all_batched, batched, save

_ops = torch.ops.metafast


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seeds: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """Fused attention of checked arguments, as ``reference.attention``.

    Leading dimensions are equal, but those of ``attn_mask`` may be 1, as may its others.
    """
    load_kernels()
    options = (attn_mask, seeds, left, right, dropout_p, scale)
    if torch.compiler.is_compiling():
        return _ops.attention_forward(query, key, value, *options)[0]
    return Attention.apply(query, key, value, *options)[0]


class Attention(Function):
    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        seeds: Tensor | None,
        left: int,
        right: int,
        dropout_p: float,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.attention_forward(query, key, value, attn_mask, seeds, left, right, dropout_p, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, attn_mask, seeds, *ctx.numbers = inputs
        ctx.mark_non_differentiable(output[1])
        save(ctx, query, key, value, *output, attn_mask, seeds)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
        by_mask = ctx.needs_input_grad[3]
        grads = AttentionBackward.apply(grad_out, *_saved_as_numbers(ctx), *ctx.numbers, by_mask)
        return (*grads[:3], grads[3] if by_mask else None, *(None,) * 5)

    @staticmethod
    def jvp(
        ctx: Any,
        tangent_query: Tensor,
        tangent_key: Tensor,
        tangent_value: Tensor,
        tangent_mask: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, None]:
        *saved, attn_mask, seeds = _saved_as_numbers(ctx)
        tangents = (tangent_query, tangent_key, tangent_value, _of_additive(attn_mask, tangent_mask))
        return AttentionJvp.apply(*saved, *tangents, attn_mask, seeds, *ctx.numbers), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return Attention.apply(*batched(info, in_dims, inputs, unexpanded=(3,))), (0, 0)


class AttentionBackward(Function):
    """Gradients by query, key and value, and with ``by_mask`` by an additive mask."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        statistics: Tensor,
        attn_mask: Tensor | None,
        seeds: Tensor | None,
        left: int,
        right: int,
        dropout_p: float,
        scale: float,
        by_mask: bool,
    ) -> tuple[Tensor, ...]:
        saved = (grad_out, query, key, value, out, statistics)
        options = (attn_mask, seeds, left, right, dropout_p, scale)
        grads = _ops.attention_backward(*saved, *options)
        return (*grads, _ops.attention_mask_backward(*saved, *options)) if by_mask else grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, (*ctx.numbers, ctx.by_mask) = inputs[:8], inputs[8:]
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        *saved, attn_mask, seeds = ctx.saved_tensors
        tangent_mask = tangents[3] if ctx.by_mask else None
        directions = (*tangents[:3], tangent_mask, None)
        # The mask's share is symmetric: it is wanted where its gradient was.
        grads = AttentionBackwardJvp.apply(*saved, *directions, attn_mask, seeds, *ctx.numbers, ctx.by_mask)
        return (*grads[:4], None, None, grads[4] if ctx.by_mask else None, *(None,) * 6)

    @staticmethod
    def jvp(
        ctx: Any,
        tangent_grad_out: Tensor,
        tangent_query: Tensor,
        tangent_key: Tensor,
        tangent_value: Tensor,
        tangent_out: Tensor | None,
        tangent_statistics: Tensor | None,
        tangent_mask: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, ...]:
        *saved, attn_mask, seeds = ctx.saved_tensors
        mask = _of_additive(attn_mask, tangent_mask)
        directions = (tangent_query, tangent_key, tangent_value, mask, tangent_grad_out)
        return AttentionBackwardJvp.apply(*saved, *directions, attn_mask, seeds, *ctx.numbers, ctx.by_mask)[1:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return all_batched(AttentionBackward.apply(*batched(info, in_dims, inputs, unexpanded=_unless(inputs[-1], 6))))


class AttentionJvp(Function):
    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        statistics: Tensor,
        tangent_query: Tensor,
        tangent_key: Tensor,
        tangent_value: Tensor,
        tangent_mask: Tensor | None,
        attn_mask: Tensor | None,
        seeds: Tensor | None,
        left: int,
        right: int,
        dropout_p: float,
        scale: float,
    ) -> Tensor:
        tangents = (tangent_query, tangent_key, tangent_value, tangent_mask)
        options = (attn_mask, seeds, left, right, dropout_p, scale)
        return _ops.attention_jvp(query, key, value, out, statistics, *tangents, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.numbers = inputs[11:]
        save(ctx, *inputs[:11])

    @staticmethod
    def backward(ctx: Any, grad_tangent: Tensor) -> tuple[Tensor | None, ...]:
        # <grad_tangent, J t> is linear in the directions t, so their gradient is the ordinary backward; by query, key
        # value and mask it is the derivative of that backward in the directions t.
        *saved, tangent_query, tangent_key, tangent_value, tangent_mask, attn_mask, seeds = ctx.saved_tensors
        options = (attn_mask, seeds, *ctx.numbers)
        by_mask = tangent_mask is not None
        by_tangents = AttentionBackward.apply(grad_tangent, *saved, *options, by_mask)
        directions = (tangent_query, tangent_key, tangent_value, tangent_mask, None)
        by_mask_too = ctx.needs_input_grad[9]
        by_inputs = AttentionBackwardJvp.apply(grad_tangent, *saved, *directions, *options, by_mask_too)[1:]
        return (
            *by_inputs[:3],
            None,
            None,
            *by_tangents[:3],
            by_tangents[3] if by_mask else None,
            by_inputs[3] if by_mask_too else None,
            *(None,) * 5,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        # Unreachable from the public function, see validation.py.
        raise NotImplementedError("metafast attention: forward mode over forward mode has no fused kernel")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return AttentionJvp.apply(*batched(info, in_dims, inputs, unexpanded=(8, 9))), 0


class AttentionBackwardJvp(Function):
    """Tangents of the output and of what ``AttentionBackward`` returns."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        statistics: Tensor,
        tangent_query: Tensor,
        tangent_key: Tensor,
        tangent_value: Tensor,
        tangent_mask: Tensor | None,
        tangent_grad_out: Tensor | None,
        attn_mask: Tensor | None,
        seeds: Tensor | None,
        left: int,
        right: int,
        dropout_p: float,
        scale: float,
        by_mask: bool,
    ) -> tuple[Tensor, ...]:
        saved = (grad_out, query, key, value, out, statistics)
        tangents = (tangent_query, tangent_key, tangent_value, tangent_mask, tangent_grad_out)
        arguments = (*saved, *tangents, attn_mask, seeds, left, right, dropout_p, scale)
        results = _ops.attention_backward_jvp(*arguments)
        return (*results, _ops.attention_mask_backward_jvp(*arguments)) if by_mask else results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *ctx.numbers, ctx.by_mask = inputs[13:]
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*inputs[:6], *inputs[11:13])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Linear in the tangents, and symmetric: their gradients are the same pass in the direction of the cotangents.
        if any(_is_wanted(ctx, position) for position in (*range(4), 11)):
            _raise_third_order()
        *saved, attn_mask, seeds = ctx.saved_tensors
        grad_out, query, key, value, *grad_mask = grads
        directions = (query, key, value, grad_mask[0] if ctx.by_mask else None, grad_out)
        by_mask = ctx.is_tensor[9]
        by_grad_out, *by_tangents = AttentionBackwardJvp.apply(
            *saved, *directions, attn_mask, seeds, *ctx.numbers, by_mask
        )
        return (
            *(None,) * 6,
            *by_tangents[:3],
            by_tangents[3] if by_mask else None,
            by_grad_out if ctx.is_tensor[10] else None,
            *(None,) * 7,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _raise_third_order()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        arguments = batched(info, in_dims, inputs, unexpanded=_unless(inputs[-1], 9, 11))
        return all_batched(AttentionBackwardJvp.apply(*arguments))


def _raise_third_order() -> NoReturn:
    raise NotImplementedError(
        'metafast attention: the fused path is differentiable twice; for a third derivative use backend="reference"'
    )


def _is_wanted(ctx: Any, position: int) -> bool:
    """Whether this backward pass asks for the gradient by an input: ``needs_input_grad`` tells only whether one might."""
    if not ctx.needs_input_grad[position]:
        return False
    node = ctx.next_functions[sum(ctx.is_tensor[:position])][0]
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # Torch does not say so of a leaf that autograd.grad is asked for.
        return True


def _saved_as_numbers(ctx: Any) -> tuple[Tensor | None, ...]:
    """What ``Attention`` has saved, with ``out`` cut from the graph.

    An edge to ``Attention`` would have autograd run its backward again in every double backward, on zeros.
    """
    query, key, value, out, *rest = ctx.saved_tensors
    return query, key, value, out.detach(), *rest


def _of_additive(attn_mask: Tensor | None, tangent: Tensor | None) -> Tensor | None:
    return tangent if attn_mask is not None and attn_mask.dtype != torch.bool else None


def _unless(by_mask: bool, *masks: int) -> tuple[int, ...]:
    """Where masks are among the inputs, unless their gradients are returned and need the batch dimension in full."""
    return () if by_mask else masks
