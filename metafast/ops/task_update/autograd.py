"""Derivatives of the fused update.

The first derivative is a kernel. Derivatives of that, and tangents, are rare: no first- or second-order algorithm takes
them of the update. Where a rule is linear in its tensors they are the kernels again, else they are the reference's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafast.inner import Rule
from metafast.ops.functions import Function, all_batched, is_forward_mode
from metafast.ops.task_update import library, reference
from metafast.ops.torch_internals import are_transforms_active

__all__ = ["only_derivatives", "update"]

Group = Sequence[Tensor]
Tensors = tuple[Tensor, ...]


class _Here(threading.local):
    numbers: bool = True


_here = _Here()


@contextlib.contextmanager
def only_derivatives(only: bool = True) -> Iterator[None]:
    """Inside, where ``only``, results of an update that autograd follows have its graph, and no numbers of their own: zeros.

    A graph that is rebuilt for its derivative has no use for them. They would take the memory of a set of parameters.
    """
    before, _here.numbers = _here.numbers, not only
    try:
        yield
    finally:
        _here.numbers = before


def update(rule: Rule, groups: Sequence[Group], step: int) -> tuple[list[Tensor], ...]:
    """``library.update``, differentiable."""
    if not _is_followed(groups):
        return library.update(rule, groups, step)
    params, grads = groups[0], groups[1]
    layout = _Layout(
        rule=rule,
        step=step,
        sizes=tuple(len(group) for group in groups),
        shared=tuple(param.dim() < grad.dim() for param, grad in zip(params, grads, strict=True)),
        numbers=_here.numbers,
    )
    flat = _Update.apply(layout, *(tensor for group in groups for tensor in group))
    return layout.split_results(flat)


def _is_followed(groups: Sequence[Group]) -> bool:
    """Whether autograd or a transform of torch.func looks on; without them a Function is only overhead."""
    if torch.compiler.is_compiling() or are_transforms_active():
        return True
    if is_forward_mode():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for group in groups for tensor in group)


@dataclass(frozen=True)
class _Layout:
    """How the tensors of a call lie in the flat argument lists that autograd wants."""

    rule: Rule
    step: int
    sizes: tuple[int, ...]  # of the groups: parameters, gradients, state by state, rate by rate
    shared: tuple[bool, ...]
    numbers: bool  # whether results have them

    def split(self, flat: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        return _split(flat, self.sizes)

    def tangents(self, kinds: Sequence[Any], given: Sequence[Tensor | None]) -> Tensors:
        """Zeros for what is None, of parameters, gradients and states."""
        found, count = [], len(kinds)
        for i, tensor in enumerate(given):
            shape, dtype, device = kinds[i % count]
            shape = shape[1:] if i < count and self.shared[i] else shape
            found.append(torch.zeros(shape, dtype=dtype, device=device) if tensor is None else tensor)
        return tuple(found)

    def split_results(self, flat: Sequence[Any]) -> tuple[list[Any], ...]:
        return _split(flat, [len(self.shared)] * (1 + len(self.rule.state_names)))

    @property
    def results(self) -> int:
        """How many tensors the update returns."""
        return len(self.shared) * (1 + len(self.rule.state_names))

    @property
    def first(self) -> bool:
        return self.rule.keeps_state and self.sizes[2] == 0

    @property
    def linear(self) -> bool:
        """Whether the update is linear in all its tensors: every rate is a number."""
        return library.is_linear(self.rule) and not any(self.sizes[-len(self.rule.rate_names) :])

    def reference(self, *flat: Tensor) -> Tensors:
        return _join(reference.update(self.rule, self.split(flat), self.step))

    def reference_vjp(self, *flat: Tensor) -> Tensors:
        """Of the flat arguments of ``_Vjp``: cotangents, then the tensors of the update."""
        return _vjp(self.reference, flat[self.results :], flat[: self.results])


class _Update(Function):
    @staticmethod
    def forward(layout: _Layout, *flat: Tensor) -> Tensors:
        groups = layout.split(flat)
        if not layout.numbers:
            results = layout.results // len(layout.shared)
            return tuple(grad.new_zeros(()).expand(grad.shape) for _ in range(results) for grad in groups[1])
        return _join(library.update(layout.rule, groups, layout.step))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.layout, *flat = inputs
        if not ctx.layout.linear:
            ctx.save_for_backward(*flat)
            ctx.save_for_forward(*flat)
        if ctx.layout.rule.keeps_state:
            # Nothing follows the state of the last step: no zeros are made and read for its cotangents.
            ctx.set_materialize_grads(False)
            ctx.kinds = [(o.shape, o.dtype, o.device) for o in output[: len(ctx.layout.shared)]]

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        saved = () if layout.linear else ctx.saved_tensors
        double = torch.is_grad_enabled()
        cotangents = _materialized(layout, ctx.kinds, given, double) if layout.rule.keeps_state else given
        if double:
            return None, *_Vjp.apply(layout, *cotangents, *saved)
        needed = [any(group) for group in layout.split(ctx.needs_input_grad[1:])]
        products = _native_vjp(layout, layout.split_results(cotangents), saved, needed)
        padded: list[Tensor | None] = []
        for group, size in zip(products, layout.sizes, strict=True):
            padded += group if group else [None] * size
        return None, *padded

    @staticmethod
    def jvp(ctx: Any, _: None, *given: Tensor | None) -> Tensors:
        layout: _Layout = ctx.layout
        if layout.linear:
            return _Update.apply(layout, *(layout.tangents(ctx.kinds, given) if layout.rule.keeps_state else given))
        tangents = (torch.zeros_like(s) if t is None else t for t, s in zip(given, ctx.saved_tensors, strict=True))
        return _jvp(layout.reference, ctx.saved_tensors, tuple(tangents))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], layout: _Layout, *flat: Tensor) -> tuple[Tensors, tuple[int, ...]]:
        return _vmap(_Update, info.batch_size, in_dims[1:], layout, flat)


class _Vjp(torch.autograd.Function):
    """The vector-Jacobian product as a function of the cotangents and, where the update is not linear, its tensors."""

    @staticmethod
    def forward(layout: _Layout, *flat: Tensor) -> Tensors:
        count = layout.results
        cotangents = layout.split_results(flat[:count])
        products = _native_vjp(layout, cotangents, flat[count:], [size > 0 for size in layout.sizes])
        if not layout.linear:
            # An input that is saved cannot be an output too, but a view of it can.
            to_params = zip(products[0], flat, strict=False)
            products = ([p.view_as(p) if p is cotangent else p for p, cotangent in to_params], *products[1:])
        return _join(products)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.layout, *flat = inputs
        if not ctx.layout.linear:
            ctx.save_for_backward(*flat)
            ctx.save_for_forward(*flat)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        if layout.linear:
            return None, *_Update.apply(layout, *cotangents)
        return None, *_vjp(layout.reference_vjp, ctx.saved_tensors, cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Tensors:
        layout: _Layout = ctx.layout
        if layout.linear:
            return _Vjp.apply(layout, *tangents)
        return _jvp(layout.reference_vjp, ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], layout: _Layout, *flat: Tensor) -> tuple[Tensors, tuple[int, ...]]:
        return _vmap(_Vjp, info.batch_size, in_dims[1:], layout, flat)


def _materialized(
    layout: _Layout, kinds: Sequence[Any], given: Sequence[Tensor | None], everything: bool
) -> tuple[Tensor | None, ...]:
    """Zeros for what is None: everywhere, or of groups of states only where another one is not None."""
    found: list[Tensor | None] = []
    for i, group in enumerate(_split(given, [len(kinds)] * (len(given) // len(kinds)))):
        if i > 0 and not everything and all(tensor is None for tensor in group):
            found += group
            continue
        for tensor, (shape, dtype, device) in zip(group, kinds, strict=True):
            found.append(torch.zeros(shape, dtype=dtype, device=device) if tensor is None else tensor)
    return tuple(found)


def _native_vjp(
    layout: _Layout, cotangents: Sequence[Sequence[Tensor | None]], saved: Tensors, needed: list[bool]
) -> tuple[list[Tensor], ...]:
    groups = layout.split(saved) if saved else ([],) * len(layout.sizes)
    results: list[Any] = [[] if group and group[0] is None else group for group in cotangents]
    return library.vjp(layout.rule, results, groups, layout.step, layout.first, layout.shared, needed)


def _vjp(function: Callable[..., Tensors], primals: Tensors, cotangents: Tensors) -> Tensors:
    pullback = torch.func.vjp(function, *primals)[1]
    return pullback(cotangents)


def _jvp(function: Callable[..., Tensors], primals: Tensors, tangents: Tensors) -> Tensors:
    # Reverse mode twice: forward mode cannot be entered from within a Function's jvp. The pullback is linear in the
    # cotangents, so where it is differentiated does not matter.
    values = function(*primals)
    zeros = tuple(torch.zeros_like(value) for value in values)
    return _vjp(lambda *cotangents: _vjp(function, primals, cotangents), zeros, tangents)


def _vmap(
    function: type[torch.autograd.Function], size: int, in_dims: Sequence[int | None], layout: _Layout, flat: Tensors
) -> tuple[Tensors, tuple[int, ...]]:
    # One call for each index: rates and sums over tasks would otherwise need a second batch dimension in the kernels.
    calls = [
        function.apply(
            layout,
            *(tensor if dim is None else tensor.select(dim, index) for tensor, dim in zip(flat, in_dims, strict=True)),
        )
        for index in range(size)
    ]
    return all_batched(tuple(torch.stack(results) for results in zip(*calls, strict=True)))


def _split(flat: Sequence[Any], sizes: Sequence[int]) -> tuple[list[Any], ...]:
    groups, begin = [], 0
    for size in sizes:
        groups.append(list(flat[begin : begin + size]))
        begin += size
    return tuple(groups)


def _join(groups: Sequence[Group]) -> Tensors:
    return tuple(tensor for group in groups for tensor in group)
