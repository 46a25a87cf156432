"""The native ops: their schemas, what they return as far as shapes go, and the call for each rule.

The schemas are defined here and not in the extension so that they exist without it; the kernels are registered by
``csrc/cpu/task_update.cpp`` and ``csrc/cuda/task_update.cu`` when the extension loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metafast.inner import SGD, Rule

__all__ = ["update", "vjp"]

Group = Sequence[Tensor]

_SGD_NUMBERS = "float lr, float momentum, float dampening, bool nesterov, float weight_decay, bool maximize"
_library = torch.library.Library("metafast", "FRAGMENT")
_library.define(
    "sgd_update(Tensor[] params, Tensor[] grads, Tensor[] momentum_buffers, Tensor[] lrs, Tensor[] weight_decays, "
    f"{_SGD_NUMBERS}) -> (Tensor[], Tensor[])"
)
_library.define(
    "sgd_update_vjp(Tensor[] d_params, Tensor[] d_buffers, Tensor[] params, Tensor[] grads, Tensor[] momentum_buffers, "
    f"Tensor[] lrs, Tensor[] weight_decays, {_SGD_NUMBERS}, bool first, bool[] shared, bool[] needed) "
    "-> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])"
)


def update(rule: Rule, groups: Sequence[Group]) -> tuple[list[Tensor], ...]:
    """The next parameters and state by the kernels; takes and returns what ``reference.update`` does."""
    results = torch.ops.metafast.sgd_update(*_padded(groups, 5), *_numbers(rule))
    return tuple(results[: 1 + len(rule.state_names)])


def vjp(
    rule: Rule,
    cotangents: Sequence[Group],
    groups: Sequence[Group],
    first: bool,
    shared: Sequence[bool],
    needed: Sequence[bool],
) -> tuple[list[Tensor], ...]:
    """The vector-Jacobian product of :func:`update` by the kernels.

    Args:
        rule: the update rule.
        cotangents: of what ``update`` returned, group by group, all of shape ``[T, *shape]``.
        groups: what ``update`` took. Parameters, gradients and state are read only for the product with a rate.
        first: whether ``update`` was given no state.
        shared: for each parameter, whether it had no task dimension.
        needed: for each group, whether its product is wanted; the others come back without tensors.

    Returns:
        The products, with the shapes of ``groups``; cotangents themselves where they are the product.
    """
    # Without weight decay a parameter of a task passes its cotangent on as it is.
    same = needed[0] and rule.weight_decay == 0 and not groups[-1] and not any(shared)
    wanted = [needed[0] and not same, *needed[1:]]
    if not any(wanted):
        return (list(cotangents[0]) if same else [], *([] for _ in groups[1:]))
    full = _padded(cotangents, 2), _padded(groups, 5), _padded(wanted, 5, False)
    products = torch.ops.metafast.sgd_update_vjp(*full[0], *full[1], *_numbers(rule), first, list(shared), full[2])
    if len(groups) < 5:
        products = (*products[:2], *products[3:])
    return (list(cotangents[0]), *products[1:]) if same else tuple(products)


def _padded(groups: Sequence[Any], count: int, nothing: Any = ()) -> list[Any]:
    """Groups as the op takes them: without momentum there are none of buffers."""
    return [*groups[:2], *[nothing] * (count - len(groups)), *groups[2:]] if count > 2 else [*groups, nothing][:2]


def _numbers(rule: SGD) -> tuple[float, float, float, bool, float, bool]:
    return rule.lr, rule.momentum, rule.dampening, rule.nesterov, rule.weight_decay, rule.maximize


@torch.library.register_fake("metafast::sgd_update", lib=_library)
def _(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lrs: list[Tensor],
    weight_decays: list[Tensor],
    lr: float,
    momentum: float,
    *numbers: float,
) -> tuple[list[Tensor], list[Tensor]]:
    return _like(grads), _like(grads) if momentum != 0 else []


@torch.library.register_fake("metafast::sgd_update_vjp", lib=_library)
def _(
    d_params: list[Tensor],
    d_buffers: list[Tensor],
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lrs: list[Tensor],
    weight_decays: list[Tensor],
    *rest: float | bool | list[bool],
) -> tuple[list[Tensor], ...]:
    shared, needed = rest[-2:]
    assert isinstance(shared, list) and isinstance(needed, list)  # noqa: PT018 - narrows the types
    sums = [d.new_empty(d.shape[one:]) for d, one in zip(d_params, shared, strict=True)]
    made = (sums, _like(d_params), _like(d_params), _like(lrs), _like(weight_decays))
    return tuple(group if wanted else [] for group, wanted in zip(made, needed, strict=True))


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in tensors]
