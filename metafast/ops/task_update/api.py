"""The public function: validates, resolves the backend, calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from metafast.backend import resolve_backend
from metafast.inner import Rule
from metafast.ops.task_update import autograd, library, reference
from metafast.ops.task_update.clipping import clipped
from metafast.ops.task_update.validation import (
    Arguments,
    SomeTensors,
    Tensors,
    arranged,
    check_tensors,
    reasons_against_fused,
    values,
)
from metafast.ops.torch_internals import are_transforms_active

__all__ = ["task_update"]

Container = TypeVar("Container", bound=Tensors)


def task_update(
    rule: Rule,
    params: Container,
    grads: SomeTensors,
    state: Mapping[str, SomeTensors] | None = None,
    *,
    rates: Mapping[str, Tensor | Tensors] | None = None,
    step: int = 0,
    backend: str | None = None,
) -> tuple[Container, dict[str, Container]]:
    """One step of an update rule for all parameters of T tasks, differentiable in every tensor that it takes.

    One call reads each tensor once and writes each result once, whatever the number and the sizes of the tensors. The
    first derivative is one such call too, and keeps no tensor in memory unless a rate is a tensor.

    Args:
        rule: one of :mod:`metafast.inner`, or a rule with a formula of its own (:meth:`metafast.inner.Rule.formula`).
        params: list, tuple or dict of tensors, each ``[T, *shape]`` or, the same for all tasks, ``[*shape]``; float32,
            float64, bfloat16 or float16 (computed in float32), on one device.
        grads: a gradient ``[T, *shape]`` for each parameter tensor, in a container as ``params``, with its dtypes. None
            in place of one freezes the parameter: it is handed on as it is, and so is its state.
        state: what the step before returned as its second result; None at the first step.
        rates: what replaces a number of the rule, by its name (``"lr"``, ``"weight_decay"``): a tensor without
            dimensions, of any of these dtypes; or a container as ``params`` of such tensors or of tensors ``[*shape]``,
            a rate for each single parameter, with the parameter's dtype.
        step: number of the step, from 0.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``; see :mod:`metafast.backend`.

    Returns:
        The parameters after the step, ``[T, *shape]`` each, in a container of the type of ``params``; and the state, a
        dict of such containers (``"momentum_buffer"`` for SGD with momentum, empty without).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: ``backend="fused"`` without a kernel for the device.
    """
    found, names = arranged(rule, params, grads, state, rates, step), rule.state_names
    if torch.compiler.is_compiling():
        check_tensors(rule, found)
        results = _results(rule, found, step, backend)
    else:
        try:
            results = _results(rule, found, step, backend)
        except Exception:
            check_tensors(rule, found)
            raise
    if not all(found.updated):
        before = [
            values(params, params),
            *(values(state[n], params) if state else [None] * len(params) for n in names),
        ]
        results = tuple(_merged(new, old, found.updated) for new, old in zip(results, before, strict=True))
    named = zip(names, results[1:], strict=True)
    return _contained(results[0], params), {name: _contained(tensors, params) for name, tensors in named}


def _results(rule: Rule, arguments: Arguments, step: int, backend: str | None) -> tuple[list[Tensor], ...]:
    groups = arguments.groups
    some = bool(groups[1])  # are not frozen
    fused = some and resolve_backend("task_update", backend, _reasons_against_fused(rule, groups)) == "fused"
    # Kernels that run here and now look at each tensor themselves.
    if not fused or are_transforms_active():
        check_tensors(rule, arguments)
    if not some:
        return tuple([] for _ in range(1 + len(rule.state_names)))
    return (autograd.update if fused else reference.update)(rule, _with_clipped(rule, groups), step)


def _reasons_against_fused(rule: Rule, groups: tuple[list[Tensor], ...]) -> list[str]:
    without = [] if library.supports(rule) else [f"no kernel for the rule {type(rule).__name__}"]
    return [*without, *reasons_against_fused(groups[0][0].device)]


def _with_clipped(rule: Rule, groups: tuple[list[Tensor], ...]) -> tuple[list[Tensor], ...]:
    if rule.clip_norm is None and rule.clip_value is None:
        return groups
    return (groups[0], clipped(groups[1], rule.clip_norm, rule.clip_value), *groups[2:])


def _merged(new: list[Tensor], old: Any, updated: list[bool]) -> list[Tensor]:
    remaining = iter(new)
    return [next(remaining) if is_new else before for is_new, before in zip(updated, old, strict=True)]


def _contained(tensors: list[Tensor], like: Any) -> Any:
    if isinstance(like, list):
        return tensors
    return tuple(tensors) if isinstance(like, tuple) else dict(zip(like, tensors, strict=True))
