"""What the task update accepts, made uniform: groups of tensors in the order of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metafast import backend
from metafast.inner import Rule
from metafast.ops.task_update import reference

__all__ = ["Arguments", "Tensors", "arranged", "check_tensors", "reasons_against_fused", "values"]

Tensors: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor]
SomeTensors: TypeAlias = Sequence[Tensor | None] | Mapping[str, Tensor | None]
Labels: TypeAlias = Sequence[str] | Sequence[int]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Arguments(NamedTuple):
    """The tensors of a call, in the order of the parameters.

    ``groups`` are those of the parameters with a gradient: parameters, gradients, each state, each rate, as
    ``reference.update`` takes them. ``updated`` says for each parameter whether it is among them.
    """

    groups: tuple[list[Tensor], ...]
    params: Tensors
    updated: list[bool]


def arranged(
    rule: Rule,
    params: Tensors,
    grads: SomeTensors,
    state: Mapping[str, SomeTensors] | None,
    rates: Mapping[str, Tensor | Tensors] | None,
    step: int,
) -> Arguments:
    """The arguments of ``task_update``, of which rule, step and containers are checked; :func:`check_tensors` does the rest.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not reference.supports(rule):
        raise TypeError(f"rule: expected a rule of metafast.inner, got {_type(rule)}")
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step: expected an int, got {_type(step)}")
    if step < 0:
        raise ValueError(f"step: expected at least 0, got {step}")
    param_list = _listed("params", params, like=params)
    if not param_list:
        raise ValueError("params: expected at least one tensor, got none")
    grad_list = _listed("grads", grads, like=params)
    groups = (param_list, grad_list, *_state_groups(rule, params, state, step), *_rate_groups(rule, params, rates))
    updated = [grad is not None for grad in grad_list]
    if not all(updated):
        # Of a rate there may be one for all.
        groups = tuple(_picked(group, updated) if len(group) == len(updated) else group for group in groups)
    return Arguments(groups, params, updated)


def check_tensors(rule: Rule, arguments: Arguments) -> None:
    """Checks each tensor. The kernels refuse any that this does, at no cost, but cannot say which one it is.

    Raises:
        TypeError, ValueError: naming the tensor, what was expected and what came.
    """
    groups, params, updated = arguments
    names = [
        "params",
        "grads",
        *(f"state[{n!r}]" for n in rule.state_names),
        *(f"rates[{n!r}]" for n in rule.rate_names),
    ]
    keys: Labels = list(params) if isinstance(params, Mapping) else list(range(len(params)))
    _check_are_tensors("params", keys, values(params, params))
    labels: Labels = _picked(keys, updated)
    for name, group in zip(names, groups, strict=True):
        _check_are_tensors(name, labels, group)
    if not any(updated):
        return
    _check_params(labels, *groups[:2])
    grads, states = groups[1], range(2, len(groups) - 2)
    for k in states:
        for i, (tensor, grad) in enumerate(zip(groups[k], grads, strict=True) if groups[k] else ()):
            _check_shape(names[k], labels, i, tensor, grad.shape, "the gradient's shape {}")
            _check_kind(names[k], labels, i, tensor, grad.dtype, grad.device)
    for name, group in zip(names[-2:], groups[-2:], strict=True):
        for i, (tensor, grad) in enumerate(zip(group, grads, strict=len(group) > 1)):
            if tensor.dim() != 0:
                _check_shape(name, labels, i, tensor, grad.shape[1:], "no dimensions or the parameter's shape {}")
            _check_dtype(_entry(name, labels, i), tensor)
            _check_kind(name, labels, i, tensor, tensor.dtype if tensor.dim() == 0 else grad.dtype, grad.device)


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


def _listed(name: str, tensors: SomeTensors, like: Tensors) -> list[Any]:
    """What is in the container, in the order of the parameters ``like``."""
    if isinstance(tensors, (list, tuple)):  # first: it takes a tenth of the time that it takes to ask for a Mapping
        if not isinstance(like, (list, tuple)):
            raise TypeError(f"{name}: expected a dict, as params is, got {_type(tensors)}")
        if len(tensors) != len(like):
            raise ValueError(f"{name}: expected {len(like)} tensors, one a parameter tensor, got {len(tensors)}")
    elif not isinstance(tensors, Mapping):
        raise TypeError(f"{name}: expected a list, tuple or dict of tensors, got {_type(tensors)}")
    elif not isinstance(like, Mapping):
        raise TypeError(f"{name}: expected a list or tuple, as params is, got {_type(tensors)}")
    elif tensors.keys() != like.keys():
        differing = sorted(map(str, tensors.keys() ^ like.keys()))
        raise ValueError(f"{name}: expected the keys of params, got others or too few: {', '.join(differing)}")
    return values(tensors, like)


def _state_groups(rule: Rule, params: Tensors, state: Mapping[str, SomeTensors] | None, step: int) -> list[list[Any]]:
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
    return [_listed(f"state[{name!r}]", state[name], like=params) for name in names]


def _rate_groups(rule: Rule, params: Tensors, rates: Mapping[str, Tensor | Tensors] | None) -> list[list[Any]]:
    if rates is None:
        return [[] for _ in rule.rate_names]
    if not isinstance(rates, Mapping):
        raise TypeError(f"rates: expected None or a dict of tensors, got {_type(rates)}")
    unknown = [str(name) for name in rates if name not in rule.rate_names]
    if unknown:
        raise ValueError(f"rates: expected keys among {', '.join(rule.rate_names)}, got {', '.join(unknown)}")
    groups: list[list[Any]] = []
    for name in rule.rate_names:
        rate, label = rates.get(name, ()), f"rates[{name!r}]"
        if isinstance(rate, Tensor):
            if rate.dim() != 0:
                raise ValueError(
                    f"{label}: expected a tensor without dimensions, or a container of tensors as params, "
                    f"got shape {tuple(rate.shape)}"
                )
            _check_dtype(label, rate)
            groups.append([rate])
        else:
            groups.append(_listed(label, rate, like=params) if name in rates else [])
    return groups


def _check_are_tensors(name: str, labels: Labels, group: list[Any]) -> None:
    for i, tensor in enumerate(group):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_entry(name, labels, i)}: expected a tensor, got {_type(tensor)}")


def _check_params(labels: Labels, params: list[Tensor], grads: list[Tensor]) -> None:
    tasks = grads[0].shape[:1]
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        shape, batched = param.shape, grad.shape
        if not batched or (shape != batched and shape != batched[1:]):
            raise ValueError(
                f"{_entry('grads', labels, i)}: expected the parameter's shape {tuple(shape)}, with tasks as its "
                f"first dimension or with a dimension of tasks before it, got {tuple(batched)}"
            )
        if batched[:1] != tasks:
            raise ValueError(
                f"{_entry('grads', labels, i)}: expected {tasks[0]} tasks, as in the first gradient, "
                f"got shape {tuple(batched)}"
            )
        _check_dtype(_entry("params", labels, i), param)
        _check_kind("params", labels, i, param, param.dtype, params[0].device)
        _check_kind("grads", labels, i, grad, param.dtype, params[0].device)


def _check_shape(name: str, labels: Labels, i: int, tensor: Tensor, shape: torch.Size, expected: str) -> None:
    if tensor.shape != shape:
        expected = expected.format(tuple(shape))
        raise ValueError(f"{_entry(name, labels, i)}: expected {expected}, got {tuple(tensor.shape)}")


def _check_dtype(label: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{label}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def _check_kind(name: str, labels: Labels, i: int, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{_entry(name, labels, i)}: expected the parameter's dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(
            f"{_entry(name, labels, i)}: expected the device {device} of the first parameter, got {tensor.device}"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(f"{_entry(name, labels, i)}: expected a dense tensor, got layout {tensor.layout}")


def _entry(name: str, labels: Labels, i: int) -> str:
    return f"{name}[{labels[i]!r}]"


def _type(value: object) -> str:
    return type(value).__name__


def values(tensors: Any, like: Tensors) -> list[Any]:
    """What is in a container of the kind of ``like``, in its order."""
    return list(tensors) if isinstance(tensors, (list, tuple)) else [tensors[key] for key in like]


def _picked(listed: Sequence[Any], updated: list[bool]) -> list[Any]:
    return [each for each, is_updated in zip(listed, updated, strict=True) if is_updated]
