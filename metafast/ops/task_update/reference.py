"""The update in plain PyTorch: differentiable to any order, in any floating-point type, one tensor at a time.

Takes and returns the same groups of tensors as ``library.update``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metafast.inner import SGD

__all__ = ["update"]

Group = Sequence[Tensor]


def update(rule: SGD, groups: Sequence[Group]) -> tuple[list[Tensor], ...]:
    """The next parameters and state, as groups of one tensor a parameter.

    Args:
        rule: the update rule.
        groups: the parameters ``[T, *shape]`` or ``[*shape]``, the gradients ``[T, *shape]``, each state of the rule
            ``[T, *shape]`` (no tensors at the first step), the learning rates and the weight decays (no tensors: the
            rule's number; one; or one a parameter tensor).
    """
    params, grads, *states, lrs, decays = groups
    buffers = states[0] if states else []
    new_params: list[Tensor] = []
    new_buffers: list[Tensor] = []
    for i, (original, grad) in enumerate(zip(params, grads, strict=True)):
        param, gradient = _master(original), _master(grad)
        if rule.maximize:
            gradient = -gradient
        if decays or rule.weight_decay != 0:
            gradient = gradient + _rate(decays, i, rule.weight_decay, param) * param
        direction = gradient
        if rule.keeps_state:
            buffer = gradient
            if buffers:
                buffer = rule.momentum * _master(buffers[i]) + (1 - rule.dampening) * gradient
            direction = gradient + rule.momentum * buffer if rule.nesterov else buffer
            # `to` of a buffer that is the gradient itself would hand out an input as a second output.
            new_buffers.append(buffer.to(original.dtype) if buffer is not grad else buffer.clone())
        new_params.append((param - _rate(lrs, i, rule.lr, param) * direction).to(original.dtype))
    return (new_params, new_buffers) if states else (new_params,)


def _master(tensor: Tensor) -> Tensor:
    """Half types are computed in float32, as the kernels do."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _rate(rates: Group, i: int, number: float, param: Tensor) -> Tensor | float:
    return rates[i if len(rates) > 1 else 0].to(param.dtype) if rates else number
