"""``task_update`` for a single task whose tensors have no task dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from metafast.inner import Rule
from metafast.ops.task_update import task_update

Tensors = Sequence[Tensor]


def update(
    rule: Rule,
    params: Tensors,
    grads: Tensors,
    state: Mapping[str, Tensors] | None = None,
    rates: Mapping[str, Tensor | list[Tensor]] | None = None,
    step: int = 0,
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """One step of ``rule``; shapes are those of the parameters, in and out."""
    batched = None if state is None else {name: _batched(tensors) for name, tensors in state.items()}
    new_params, new_state = task_update(rule, _batched(params), _batched(grads), batched, rates=rates, step=step)
    return _single(new_params), {name: _single(tensors) for name, tensors in new_state.items()}


def broadcast(rate: Tensor, params: Tensors) -> Tensor | list[Tensor]:
    """A rate of any shape that broadcasts with the parameters, as ``task_update`` takes it."""
    if rate.numel() == 1:
        return rate.reshape(())
    return [rate.to(p.dtype).expand(p.shape).contiguous() for p in params]


def _batched(tensors: Tensors) -> list[Tensor]:
    return [tensor.unsqueeze(0) for tensor in tensors]


def _single(tensors: Tensors) -> list[Tensor]:
    return [tensor.squeeze(0) for tensor in tensors]
