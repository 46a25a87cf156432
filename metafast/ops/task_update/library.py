"""The native ops: their schemas, what they return as far as shapes go, and the call for each rule.

The schemas are defined here and not in the extension so that they exist without it; the kernels are registered by
``csrc/cpu/task_update/ops.cpp`` and ``csrc/cuda/task_update.cu`` when the extension loads.

An op takes a list of tensors for each group: parameters, gradients, each state that the rule may keep, learning rates,
weight decays; then the rule's numbers. Its product takes the cotangents of the results first. ``<op>.out`` writes into a
list for each result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafast.inner import SGD, Adam, AdamW, RMSprop, Rule
from metafast.ops.schemas import define_with_out

__all__ = ["is_linear", "supports", "update", "vjp"]

Group = Sequence[Tensor]
Numbers = tuple[float | bool, ...]

_RATES = ("lrs", "weight_decays")
_library = torch.library.Library("metafast", "FRAGMENT")


@dataclass(frozen=True)
class _Op:
    """The ops of a rule.

    Args:
        name: of the update.
        states: every state that the rule may keep, in the order of the op's arguments.
        schema: of the numbers.
        numbers: of a rule, at a step.
        says_first: whether the product is told that there was no state, which it may not be given.
    """

    name: str
    states: tuple[str, ...]
    schema: str
    numbers: Callable[[Any, int], Numbers]
    says_first: bool = False

    def define(self) -> None:
        """Registers schemas and shapes of the update and the product."""
        state = [f"{name}s" for name in self.states]
        groups = ["params", "grads", *state, *_RATES]
        results = ", ".join(["Tensor[]"] * (1 + len(state)))
        taken = ", ".join(f"Tensor[] {group}" for group in groups)
        define_with_out(_library, f"{self.name}({taken}, {self.schema}) -> ({results})")
        cotangents = ", ".join(f"Tensor[] d_{group}" for group in ("params", *state))
        first = "bool first, " if self.says_first else ""
        products = ", ".join(["Tensor[]"] * len(groups))
        define_with_out(
            _library,
            f"{self.name}_vjp({cotangents}, {taken}, {self.schema}, {first}bool[] shared, bool[] needed) "
            f"-> ({products})",
        )
        torch.library.register_fake(f"metafast::{self.name}", self._fake, lib=_library)
        torch.library.register_fake(f"metafast::{self.name}_vjp", self._fake_vjp, lib=_library)

    def op(self, suffix: str = "") -> Any:
        return getattr(torch.ops.metafast, self.name + suffix)

    def padded(self, names: Sequence[str], groups: Sequence[Any], nothing: Any = ()) -> list[Any]:
        """What there is of each state, in the op's order, for states of these names."""
        return [groups[names.index(name)] if name in names else nothing for name in self.states]

    def _kept(self, arguments: Sequence[Any]) -> list[bool]:
        numbers = dict(zip((part.split()[-1] for part in self.schema.split(", ")), arguments, strict=True))
        optional = {
            "momentum_buffer": numbers.get("momentum", 0) != 0,
            "max_exp_avg_sq": numbers.get("amsgrad"),
            "grad_avg": numbers.get("centered"),
        }
        return [bool(optional.get(name, True)) for name in self.states]

    def _fake(self, *arguments: Any) -> tuple[list[Tensor], ...]:
        _check_devices(arguments)
        grads = arguments[1]
        kept = self._kept(arguments[4 + len(self.states) :])
        return _like(grads), *(_like(grads) if keep else [] for keep in kept)

    def _fake_vjp(self, *arguments: Any) -> tuple[list[Tensor], ...]:
        count = len(self.states)
        d_params, (shared, needed) = arguments[0], arguments[-2:]
        rates = arguments[1 + count + 2 + count :][:2]
        sums = [d.new_empty(d.shape[one:]) for d, one in zip(d_params, shared, strict=True)]
        made = [sums, *(_like(d_params) for _ in range(1 + count)), *map(_like, rates)]
        return tuple(group if wanted else [] for group, wanted in zip(made, needed, strict=True))


_SGD = _Op(
    name="sgd_update",
    states=("momentum_buffer",),
    schema="float lr, float momentum, float dampening, bool nesterov, float weight_decay, bool maximize",
    numbers=lambda r, step: (r.lr, r.momentum, r.dampening, r.nesterov, r.weight_decay, r.maximize),
    says_first=True,
)
_ADAM = _Op(
    name="adam_update",
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    schema="float lr, float beta1, float beta2, float eps, float eps_root, float weight_decay, bool amsgrad, "
    "bool maximize, bool decoupled, int step",
    numbers=lambda r, step: (
        *(r.lr, *r.betas, r.eps, r.eps_root, r.weight_decay),
        *(r.amsgrad, r.maximize, r.decoupled, step),
    ),
)
_RMSPROP = _Op(
    name="rmsprop_update",
    states=("square_avg", "momentum_buffer", "grad_avg"),
    schema="float lr, float alpha, float eps, float weight_decay, float momentum, bool centered, bool maximize",
    numbers=lambda r, step: (r.lr, r.alpha, r.eps, r.weight_decay, r.momentum, r.centered, r.maximize),
)
_OPS: dict[type[Rule], _Op] = {SGD: _SGD, Adam: _ADAM, AdamW: _ADAM, RMSprop: _RMSPROP}


def supports(rule: object) -> bool:
    """Whether this is a rule that the ops carry out."""
    return type(rule) in _OPS


def is_linear(rule: Rule) -> bool:
    """Whether the update is linear in parameters, gradients and state while rates are numbers."""
    return type(rule) is SGD


def update(rule: Rule, groups: Sequence[Group], step: int) -> tuple[list[Tensor], ...]:
    """The next parameters and state by the kernels; takes and returns what ``reference.update`` does."""
    op = _OPS[type(rule)]
    return _kept_of(op, rule, op.op()(*_arguments(op, rule, groups), *op.numbers(rule, step)))


def vjp(
    rule: Rule,
    cotangents: Sequence[Group],
    groups: Sequence[Group],
    step: int,
    first: bool,
    shared: Sequence[bool],
    needed: Sequence[bool],
) -> tuple[list[Tensor], ...]:
    """The vector-Jacobian product of :func:`update` by the kernels.

    Args:
        rule: the update rule.
        cotangents: of what ``update`` returned, group by group, all of shape ``[T, *shape]``; a state's may be none, for
            zeros.
        groups: what ``update`` took. Where the update is linear, parameters, gradients and state may be left out, but
            not the number of groups.
        step: as ``update`` took it.
        first: whether ``update`` was given no state.
        shared: for each parameter, whether it had no task dimension.
        needed: for each group, whether its product is wanted; the others come back without tensors.

    Returns:
        The products, with the shapes of ``groups``; cotangents themselves where they are the product.
    """
    op, names = _OPS[type(rule)], rule.state_names
    decays = rule.weight_decay != 0 or bool(groups[-1])  # type: ignore[attr-defined]  # every rule of _OPS has it
    # Without weight decay a parameter of a task passes its cotangent on as it is.
    same = needed[0] and not decays and not any(shared)
    wanted = [needed[0] and not same, *needed[1:]]
    products: tuple[list[Tensor], ...] = ([],) * len(wanted)
    if any(wanted):
        # Parameters are read for a decay of theirs alone.
        read = groups if decays else ([], *groups[1:])
        everything = op.op("_vjp")(
            *(cotangents[0], *op.padded(names, cotangents[1:])),
            *_arguments(op, rule, read),
            *op.numbers(rule, step),
            *([first] if op.says_first else []),
            list(shared),
            [*wanted[:2], *op.padded(names, wanted[2:], nothing=False), *wanted[-2:]],
        )
        states = [everything[2 + op.states.index(name)] for name in names]
        products = (*everything[:2], *states, *everything[-2:])
    return (list(cotangents[0]), *products[1:]) if same else products


def _arguments(op: _Op, rule: Rule, groups: Sequence[Group]) -> list[Any]:
    return [*groups[:2], *op.padded(rule.state_names, groups[2:]), *groups[-2:]]


def _kept_of(op: _Op, rule: Rule, results: Sequence[list[Tensor]]) -> tuple[list[Tensor], ...]:
    return results[0], *(results[1 + op.states.index(name)] for name in rule.state_names)


def _check_devices(arguments: Sequence[Any]) -> None:
    """Tensors on the meta device among others end up here."""
    devices = {tensor.device for group in arguments if isinstance(group, (list, tuple)) for tensor in group}
    if len(devices) > 1:
        raise ValueError(f"task_update: expected tensors on one device, got {', '.join(sorted(map(str, devices)))}")


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


for _op in (_SGD, _ADAM, _RMSPROP):
    _op.define()
