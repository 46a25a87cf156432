"""The update in plain PyTorch: differentiable to any order, in any floating-point type, one tensor at a time.

Takes and returns the same groups of tensors as ``library.update``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metafast.inner import SGD, Adam, AdamW, RMSprop, Rule
from metafast.ops.task_update.numerics import master, root

__all__ = ["supports", "update"]

Group = Sequence[Tensor]


def supports(rule: object) -> bool:
    """Whether there is a formula of this rule, here or its own."""
    return type(rule) in _FORMULAS or (isinstance(rule, Rule) and rule.has_own_formula)


def update(rule: Rule, groups: Sequence[Group], step: int) -> tuple[list[Tensor], ...]:
    """The next parameters and state, as groups of one tensor a parameter.

    Args:
        rule: the update rule.
        groups: the parameters ``[T, *shape]`` or ``[*shape]``, the gradients ``[T, *shape]``, each state of the rule
            ``[T, *shape]`` (no tensors at the first step), the learning rates and the weight decays (no tensors: the
            rule's number; one; or one a parameter tensor).
        step: number of the step, from 0.
    """
    numbers: Any = rule
    params, grads, *states, lrs, decays = groups
    formula = type(rule).formula if rule.has_own_formula else _FORMULAS[type(rule)]
    weight_decay = getattr(rule, "weight_decay", 0.0)
    results: tuple[list[Tensor], ...] = tuple([] for _ in range(1 + len(states)))
    for i, (original, grad) in enumerate(zip(params, grads, strict=True)):
        param, gradient = master(original), master(grad)
        if getattr(rule, "maximize", False):
            gradient = -gradient
        lr = _rate(lrs, i, numbers.lr, param)
        decay = _rate(decays, i, weight_decay, param) if decays or weight_decay != 0 else None
        state = {
            name: master(group[i]) if group else None for name, group in zip(rule.state_names, states, strict=True)
        }
        for group, result in zip(results, formula(rule, step, param, gradient, state, lr, decay), strict=True):
            # `to` of a buffer that is the gradient itself would hand out an input as a second output.
            group.append(result.clone() if result is grad else result.to(original.dtype))
    return results


Rate = Tensor | float
State = dict[str, Tensor | None]


def _sgd(
    rule: SGD, step: int, param: Tensor, grad: Tensor, state: State, lr: Rate, decay: Rate | None
) -> tuple[Tensor, ...]:
    if decay is not None:
        grad = grad + decay * param
    if not rule.keeps_state:
        return (param - lr * grad,)
    old = state["momentum_buffer"]
    buffer = grad if old is None else rule.momentum * old + (1 - rule.dampening) * grad
    return param - lr * (grad + rule.momentum * buffer if rule.nesterov else buffer), buffer


def _adam(
    rule: Adam, step: int, param: Tensor, grad: Tensor, state: State, lr: Rate, decay: Rate | None
) -> tuple[Tensor, ...]:
    beta1, beta2 = rule.betas
    if decay is not None:
        if rule.decoupled:
            param = param - lr * decay * param
        else:
            grad = grad + decay * param
    average = _average(state["exp_avg"], grad, beta1)
    square = _average(state["exp_avg_sq"], grad * grad, beta2)
    results = [average, square]
    if rule.amsgrad:
        greatest = state["max_exp_avg_sq"]
        square = torch.maximum(torch.zeros_like(square) if greatest is None else greatest, square)
        results.append(square)
    spread = root(square / (1 - beta2 ** (step + 1)) + rule.eps_root)
    return param - lr * (average / (1 - beta1 ** (step + 1)) / (spread + rule.eps)), *results


def _rmsprop(
    rule: RMSprop, step: int, param: Tensor, grad: Tensor, state: State, lr: Rate, decay: Rate | None
) -> tuple[Tensor, ...]:
    if decay is not None:
        grad = grad + decay * param
    square = _average(state["square_avg"], grad * grad, rule.alpha)
    results, variance = [square], square
    if rule.centered:
        average = _average(state["grad_avg"], grad, rule.alpha)
        variance = square - average * average
        results.append(average)
    direction = grad / (root(variance) + rule.eps)
    if rule.momentum != 0:
        old = state["momentum_buffer"]
        direction = direction if old is None else rule.momentum * old + direction
        results.insert(1, direction)
    return param - lr * direction, *results


_FORMULAS: dict[type[Rule], Callable[..., tuple[Tensor, ...]]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
}


def _average(old: Tensor | None, new: Tensor, keep: float) -> Tensor:
    """The exponential moving average, from 0 at the first step."""
    return (1 - keep) * new if old is None else keep * old + (1 - keep) * new


def _rate(rates: Group, i: int, number: float, param: Tensor) -> Rate:
    return rates[i if len(rates) > 1 else 0].to(param.dtype) if rates else number
