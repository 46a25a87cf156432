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

from metafast.ops import torch_internals
from metafast.ops.attention.library import load_kernels
from metafast.ops.attention.options import Told, to_op
from metafast.ops.functions import Function, all_batched, batched, save

_ops = torch.ops.metafast


def attention(query: Tensor, key: Tensor, value: Tensor, *told: *Told) -> Tensor:
    """Fused attention of checked arguments, as ``reference.attention``.

    Leading dimensions are equal, but those of ``attn_mask`` may be 1, as may its others.
    """
    load_kernels()
    if torch.compiler.is_compiling():
        return _ops.attention_forward(query, key, value, *to_op(told))[0]
    return Attention.apply(query, key, value, *told)[0]


class Attention(Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, *told: *Told) -> tuple[Tensor, Tensor]:
        with torch_internals.below_autograd():
            return _ops.attention_forward(query, key, value, *to_op(told))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, *tensors, ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        save(ctx, query, key, value, *output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
        saved, told = _saved_as_numbers(ctx)
        by_mask = ctx.needs_input_grad[3]
        grads = AttentionBackward.apply(by_mask, grad_out, *saved, *told)
        return (*grads[:3], grads[3] if by_mask else None, *_none_but_the_mask(told))

    @staticmethod
    def jvp(
        ctx: Any,
        tangent_query: Tensor,
        tangent_key: Tensor,
        tangent_value: Tensor,
        tangent_mask: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, None]:
        saved, told = _saved_as_numbers(ctx)
        tangents = (tangent_query, tangent_key, tangent_value, _of_additive(told[0], tangent_mask))
        return AttentionJvp.apply(*saved, *tangents, *told), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return Attention.apply(*batched(info, in_dims, inputs, unexpanded=(3,))), (0, 0)


class AttentionBackward(Function):
    """Gradients by query, key and value, and with ``by_mask`` by an additive mask."""

    @staticmethod
    def forward(
        by_mask: bool,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        statistics: Tensor,
        *told: *Told,
    ) -> tuple[Tensor, ...]:
        arguments = (grad_out, query, key, value, out, statistics, *to_op(told))
        grads = _ops.attention_backward(*arguments)
        return (*grads, _ops.attention_mask_backward(*arguments)) if by_mask else grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.by_mask, *tensors, ctx.options = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        saved, told = _saved(ctx, 6)
        directions = (*tangents[:3], tangents[3] if ctx.by_mask else None, None)
        # The mask's share is symmetric: it is wanted where its gradient was.
        grads = AttentionBackwardJvp.apply(ctx.by_mask, *saved, *directions, *told)
        by_mask = grads[4] if ctx.by_mask else None
        return (None, *grads[:4], None, None, by_mask, *_none_but_the_mask(told))

    @staticmethod
    def jvp(
        ctx: Any,
        _by_mask: None,
        tangent_grad_out: Tensor,
        tangent_query: Tensor,
        tangent_key: Tensor,
        tangent_value: Tensor,
        tangent_out: Tensor | None,
        tangent_statistics: Tensor | None,
        tangent_mask: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, ...]:
        saved, told = _saved(ctx, 6)
        mask = _of_additive(told[0], tangent_mask)
        directions = (tangent_query, tangent_key, tangent_value, mask, tangent_grad_out)
        return AttentionBackwardJvp.apply(ctx.by_mask, *saved, *directions, *told)[1:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return all_batched(AttentionBackward.apply(*batched(info, in_dims, inputs, unexpanded=_unless(inputs[0], 7))))


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
        *told: *Told,
    ) -> Tensor:
        tangents = (tangent_query, tangent_key, tangent_value, tangent_mask)
        return _ops.attention_jvp(query, key, value, out, statistics, *tangents, *to_op(told))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.options = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_tangent: Tensor) -> tuple[Tensor | None, ...]:
        # <grad_tangent, J t> is linear in the directions t, so their gradient is the ordinary backward; by query, key
        # value and mask it is the derivative of that backward in the directions t.
        tensors, told = _saved(ctx, 9)
        saved, tangents = tensors[:5], tensors[5:]
        by_mask = tangents[3] is not None
        by_tangents = AttentionBackward.apply(by_mask, grad_tangent, *saved, *told)
        by_mask_too = ctx.needs_input_grad[9]
        by_inputs = AttentionBackwardJvp.apply(by_mask_too, grad_tangent, *saved, *tangents, None, *told)[1:]
        return (
            *by_inputs[:3],
            None,
            None,
            *by_tangents[:3],
            by_tangents[3] if by_mask else None,
            by_inputs[3] if by_mask_too else None,
            *_none_but_the_mask(told),
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
        by_mask: bool,
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
        *told: *Told,
    ) -> tuple[Tensor, ...]:
        saved = (grad_out, query, key, value, out, statistics)
        tangents = (tangent_query, tangent_key, tangent_value, tangent_mask, tangent_grad_out)
        arguments = (*saved, *tangents, *to_op(told))
        results = _ops.attention_backward_jvp(*arguments)
        return (*results, _ops.attention_mask_backward_jvp(*arguments)) if by_mask else results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.by_mask, *tensors, ctx.options = inputs
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*tensors[:6], *tensors[11:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Linear in the tangents, and symmetric: their gradients are the same pass in the direction of the cotangents.
        if any(_is_wanted(ctx, position) for position in (*range(1, 5), 12)):
            _raise_third_order()
        saved, told = _saved(ctx, 6)
        grad_out, query, key, value, *grad_mask = grads
        directions = (query, key, value, grad_mask[0] if ctx.by_mask else None, grad_out)
        by_mask = ctx.is_tensor[10]
        by_grad_out, *by_tangents = AttentionBackwardJvp.apply(by_mask, *saved, *directions, *told)
        return (
            *(None,) * 7,
            *by_tangents[:3],
            by_tangents[3] if by_mask else None,
            by_grad_out if ctx.is_tensor[11] else None,
            *(None,) * len(told),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _raise_third_order()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        arguments = batched(info, in_dims, inputs, unexpanded=_unless(inputs[0], 10, 12))
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
        return node is not None and torch_internals.will_run_node(node)
    except RuntimeError:
        # Torch does not say so of a leaf that autograd.grad is asked for.
        return True


def _saved(ctx: Any, count: int) -> tuple[tuple[Tensor, ...], Told]:
    """The first ``count`` tensors that ``ctx`` has saved, and what the pass is told: the others, and the numbers."""
    tensors = ctx.saved_tensors
    return tensors[:count], (*tensors[count:], ctx.options)


def _saved_as_numbers(ctx: Any) -> tuple[tuple[Tensor, ...], Told]:
    """What ``Attention`` has saved, with ``out`` cut from the graph.

    An edge to ``Attention`` would have autograd run its backward again in every double backward, on zeros.
    """
    (query, key, value, out, statistics), told = _saved(ctx, 5)
    return (query, key, value, out.detach(), statistics), told


def _none_but_the_mask(told: Told) -> tuple[None, ...]:
    """The gradients by what a pass is told, after that by the mask."""
    return (None,) * (len(told) - 1)


def _of_additive(attn_mask: Tensor | None, tangent: Tensor | None) -> Tensor | None:
    return tangent if attn_mask is not None and attn_mask.dtype != torch.bool else None


def _unless(by_mask: bool, *masks: int) -> tuple[int, ...]:
    """Where masks are among the inputs, unless their gradients are returned and need the batch dimension in full."""
    return () if by_mask else masks
