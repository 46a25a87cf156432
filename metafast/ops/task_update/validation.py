"""What the task update accepts, made uniform: groups of tensors in the order of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from metafast import backend
from metafast.inner import Rule
from metafast.ops.task_update import library

__all__ = ["Tensors", "checked_groups", "reasons_against_fused"]

Tensors: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def checked_groups(
    rule: Rule,
    params: Tensors,
    grads: Tensors,
    state: Mapping[str, Tensors] | None,
    rates: Mapping[str, Tensor | Tensors] | None,
    step: int,
) -> tuple[list[Tensor], ...]:
    """Parameters, gradients, the tensors of each state and of each rate, as ``reference.update`` takes them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not library.supports(rule):
        raise TypeError(f"rule: expected a rule of metafast.inner, got {_type(rule)}")
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step: expected an int, got {_type(step)}")
    if step < 0:
        raise ValueError(f"step: expected at least 0, got {step}")
    param_list = _listed("params", params, like=None)
    if not param_list:
        raise ValueError("params: expected at least one tensor, got none")
    grad_list = _listed("grads", grads, like=params)
    _check_params(params, param_list, grad_list)
    states = _checked_state(rule, params, grad_list, state, step)
    return param_list, grad_list, *states, *_checked_rates(rule, params, grad_list, rates)


def reasons_against_fused(device: torch.device) -> list[str]:
    """Every reason why the kernels cannot update tensors on this device; empty where they can."""
    if device.type not in ("cpu", "cuda"):
        return [f"no kernel for device {device.type!r}"]
    problem = backend.extension_problem()
    if problem is not None:
        return [problem]
    extension = backend.extension()
    if device.type == "cuda" and extension is not None and extension.build_info()["cuda_architectures"] is None:
        return ["the extension was built without CUDA"]
    return []


def _listed(name: str, tensors: Tensors, like: Tensors | None) -> list[Tensor]:
    """The tensors in the order of the parameters ``like``."""
    if isinstance(tensors, Mapping):
        if like is not None and not isinstance(like, Mapping):
            raise TypeError(f"{name}: expected a list or tuple, as params is, got {_type(tensors)}")
        if like is not None and tensors.keys() != like.keys():
            differing = sorted(map(str, tensors.keys() ^ like.keys()))
            raise ValueError(f"{name}: expected the keys of params, got others or too few: {', '.join(differing)}")
        listed = [tensors[key] for key in (tensors if like is None else like)]
    elif isinstance(tensors, (list, tuple)):
        if isinstance(like, Mapping):
            raise TypeError(f"{name}: expected a dict, as params is, got {_type(tensors)}")
        if like is not None and len(tensors) != len(like):
            raise ValueError(f"{name}: expected {len(like)} tensors, one a parameter tensor, got {len(tensors)}")
        listed = list(tensors)
    else:
        raise TypeError(f"{name}: expected a list, tuple or dict of tensors, got {_type(tensors)}")
    for i, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_entry(name, tensors, i)}: expected a tensor, got {_type(tensor)}")
    return listed


def _check_params(container: Tensors, params: list[Tensor], grads: list[Tensor]) -> None:
    device, tasks = params[0].device, grads[0].shape[:1]
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        shape, batched, dtype = param.shape, grad.shape, param.dtype
        if not batched or (shape != batched and shape != batched[1:]):
            raise ValueError(
                f"{_entry('grads', container, i)}: expected the parameter's shape {tuple(shape)}, with tasks as its "
                f"first dimension or with a dimension of tasks before it, got {tuple(batched)}"
            )
        if batched[:1] != tasks:
            raise ValueError(
                f"{_entry('grads', container, i)}: expected {tasks[0]} tasks, as in the first gradient, "
                f"got shape {tuple(batched)}"
            )
        if dtype not in DTYPES:
            raise TypeError(
                f"{_entry('params', container, i)}: expected float32, float64, bfloat16 or float16, got {dtype}"
            )
        kind = (dtype, device, torch.strided)
        if (dtype, param.device, param.layout) != kind or (grad.dtype, grad.device, grad.layout) != kind:
            _check_kind("params", container, i, param, dtype, device)
            _check_kind("grads", container, i, grad, dtype, device)


def _checked_state(
    rule: Rule, params: Tensors, grads: list[Tensor], state: Mapping[str, Tensors] | None, step: int
) -> list[list[Tensor]]:
    if state is not None and not isinstance(state, Mapping):
        raise TypeError(f"state: expected None or what the previous step returned, got {_type(state)}")
    names = rule.state_names
    if not state:
        if names and step > 0:
            raise ValueError(f"state: expected what step {step - 1} returned, with {', '.join(names)}, got {state}")
        return [[] for _ in names]
    if set(state) != set(names):
        expected = f"the keys {', '.join(names)}" if names else f"nothing for {rule}"
        raise ValueError(f"state: expected {expected}, got {', '.join(map(str, state))}")
    groups = [_listed(f"state[{name!r}]", state[name], like=params) for name in names]
    for name, group in zip(names, groups, strict=True):
        for i, (tensor, grad) in enumerate(zip(group, grads, strict=True)):
            if tensor.shape != grad.shape:
                raise ValueError(
                    f"{_entry(f'state[{name!r}]', params, i)}: expected the gradient's shape {tuple(grad.shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
            _check_kind(f"state[{name!r}]", params, i, tensor, grad.dtype, grad.device)
    return groups


def _checked_rates(
    rule: Rule, params: Tensors, grads: list[Tensor], rates: Mapping[str, Tensor | Tensors] | None
) -> list[list[Tensor]]:
    if rates is None:
        return [[] for _ in rule.rate_names]
    if not isinstance(rates, Mapping):
        raise TypeError(f"rates: expected None or a dict of tensors, got {_type(rates)}")
    unknown = [str(name) for name in rates if name not in rule.rate_names]
    if unknown:
        raise ValueError(f"rates: expected keys among {', '.join(rule.rate_names)}, got {', '.join(unknown)}")
    return [_checked_rate(name, rates[name], params, grads) if name in rates else [] for name in rule.rate_names]


def _checked_rate(name: str, rate: Tensor | Tensors, params: Tensors, grads: list[Tensor]) -> list[Tensor]:
    label = f"rates[{name!r}]"
    if isinstance(rate, Tensor):
        if rate.dim() != 0:
            raise ValueError(
                f"{label}: expected a tensor without dimensions, or a container of tensors as params, "
                f"got shape {tuple(rate.shape)}"
            )
        if rate.dtype not in DTYPES:
            raise TypeError(f"{label}: expected float32, float64, bfloat16 or float16, got {rate.dtype}")
        if rate.device != grads[0].device:
            raise ValueError(f"{label}: expected the device {grads[0].device} of the parameters, got {rate.device}")
        return [rate]
    group = _listed(label, rate, like=params)
    for i, (tensor, grad) in enumerate(zip(group, grads, strict=True)):
        if tensor.dim() != 0 and tensor.shape != grad.shape[1:]:
            raise ValueError(
                f"{_entry(label, params, i)}: expected no dimensions or the parameter's shape "
                f"{tuple(grad.shape[1:])}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{_entry(label, params, i)}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}"
            )
        _check_kind(label, params, i, tensor, tensor.dtype if tensor.dim() == 0 else grad.dtype, grad.device)
    return group


def _check_kind(
    name: str, container: Tensors, i: int, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{_entry(name, container, i)}: expected the parameter's dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(
            f"{_entry(name, container, i)}: expected the device {device} of the first parameter, got {tensor.device}"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{_entry(name, container, i)}: expected a dense tensor, got layout {tensor.layout}")


def _entry(name: str, container: Tensors, i: int) -> str:
    return f"{name}[{list(container)[i]!r}]" if isinstance(container, Mapping) else f"{name}[{i}]"


def _type(value: object) -> str:
    return type(value).__name__
