"""The public function: validates, resolves the backend, calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from metafast.backend import resolve_backend
from metafast.inner import Rule
from metafast.ops.task_update import autograd, reference
from metafast.ops.task_update.clipping import clipped
from metafast.ops.task_update.validation import Tensors, checked_groups, reasons_against_fused

__all__ = ["task_update"]

Container = TypeVar("Container", bound=Tensors)


def task_update(
    rule: Rule,
    params: Container,
    grads: Tensors,
    state: Mapping[str, Tensors] | None = None,
    *,
    rates: Mapping[str, Tensor | Tensors] | None = None,
    step: int = 0,
    backend: str | None = None,
) -> tuple[Container, dict[str, Container]]:
    """One step of an update rule for all parameters of T tasks, differentiable in every tensor that it takes.

    One call reads each tensor once and writes each result once, whatever the number and the sizes of the tensors. The
    first derivative is one such call too, and keeps no tensor in memory unless a rate is a tensor.

    Args:
        rule: one of :mod:`metafast.inner`.
        params: list, tuple or dict of tensors, each ``[T, *shape]`` or, the same for all tasks, ``[*shape]``; float32,
            float64, bfloat16 or float16 (computed in float32), on one device.
        grads: a gradient ``[T, *shape]`` for each parameter tensor, in a container as ``params``, with its dtypes.
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
    groups = checked_groups(rule, params, grads, state, rates, step)
    if rule.clip_norm is not None or rule.clip_value is not None:
        groups = (groups[0], clipped(groups[1], rule.clip_norm, rule.clip_value), *groups[2:])
    reasons = reasons_against_fused(groups[0][0].device)
    resolved = resolve_backend("task_update", backend, reasons)
    update = autograd.update if resolved == "fused" else reference.update
    new_params, *states = update(rule, groups, step)
    named = {name: _contained(tensors, params) for name, tensors in zip(rule.state_names, states, strict=True)}
    return _contained(new_params, params), named


def _contained(tensors: list[Tensor], like: Any) -> Any:
    if isinstance(like, Mapping):
        return dict(zip(like, tensors, strict=True))
    return tuple(tensors) if isinstance(like, tuple) else tensors
