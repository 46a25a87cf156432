"""What the task update accepts, made uniform: groups of tensors in the order of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from metafast import backend
from metafast.inner import Rule
from metafast.ops.task_update import library

__all__ = ["Checked", "Tensors", "checked", "reasons_against_fused"]

Tensors: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor]
SomeTensors: TypeAlias = Sequence[Tensor | None] | Mapping[str, Tensor | None]
Labels: TypeAlias = Sequence[str] | Sequence[int]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Checked(NamedTuple):
    """The tensors of a call, in the order of the parameters.

    ``groups`` are those of the parameters with a gradient: parameters, gradients, each state, each rate, as
    ``reference.update`` takes them. ``updated`` says for each parameter whether it is among them.
    """

    groups: tuple[list[Tensor], ...]
    params: list[Tensor]
    updated: list[bool]


def checked(
    rule: Rule,
    params: Tensors,
    grads: SomeTensors,
    state: Mapping[str, SomeTensors] | None,
    rates: Mapping[str, Tensor | Tensors] | None,
    step: int,
    inplace: bool,
) -> Checked:
    """The arguments of ``task_update``, checked.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not library.supports(rule):
        raise TypeError(f"rule: expected a rule of metafast.inner, got {_type(rule)}")
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step: expected an int, got {_type(step)}")
    if step < 0:
        raise ValueError(f"step: expected at least 0, got {step}")
    everything = _listed("params", params, like=None)
    if not everything:
        raise ValueError("params: expected at least one tensor, got none")
    given = _listed("grads", grads, like=params, optional=True)
    labels = list(params) if isinstance(params, Mapping) else list(range(len(everything)))
    updated = [grad is not None for grad in given]
    pick = _Pick(params, labels, updated)
    if not all(updated):
        labels[:] = pick.from_list(labels)
    param_list, grad_list = pick.from_list(everything), pick.from_list(given)
    if grad_list:
        _check_params(labels, param_list, grad_list)
    states = _checked_state(rule, pick, grad_list, state, step)
    groups = (param_list, grad_list, *states, *_checked_rates(rule, pick, grad_list, rates))
    if inplace:
        _check_in_place(rule, labels, param_list, grad_list, states)
    return Checked(groups, everything, updated)


class _Pick(NamedTuple):
    """Chooses from containers like the parameters' what belongs to those with a gradient."""

    params: Tensors
    labels: list[str] | list[int]
    updated: list[bool]

    def from_list(self, listed: list) -> list:  # type: ignore[type-arg]
        if all(self.updated):
            return listed
        return [each for each, updated in zip(listed, self.updated, strict=True) if updated]

    def listed(self, name: str, tensors: SomeTensors) -> list[Tensor]:
        """Without what belongs to parameters without a gradient, which may be None."""
        picked = self.from_list(_listed(name, tensors, like=self.params, optional=not all(self.updated)))
        for i, tensor in enumerate(picked if not all(self.updated) else ()):
            if tensor is None:
                raise TypeError(f"{_entry(name, self.labels, i)}: expected a tensor, got NoneType")
        return picked


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


def _listed(name: str, tensors: SomeTensors, like: Tensors | None, optional: bool = False) -> list[Tensor]:
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
        if not (isinstance(tensor, Tensor) or (optional and tensor is None)):
            labels = list(tensors) if isinstance(tensors, Mapping) else range(len(tensors))
            raise TypeError(f"{_entry(name, labels, i)}: expected a tensor, got {_type(tensor)}")
    return listed  # type: ignore[return-value]  # where None is allowed, the caller sorts it out


def _check_params(labels: Labels, params: list[Tensor], grads: list[Tensor]) -> None:
    device, tasks, strided = params[0].device, grads[0].shape[:1], torch.strided
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        shape, batched, dtype = param.shape, grad.shape, param.dtype
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
        if dtype not in DTYPES:
            raise TypeError(
                f"{_entry('params', labels, i)}: expected float32, float64, bfloat16 or float16, got {dtype}"
            )
        # A call for each tensor would take as long as the kernel does for a small one: only what fails is looked at.
        if param.device != device or param.layout is not strided:
            _check_kind("params", labels, i, param, dtype, device)
        if grad.dtype is not dtype or grad.device != device or grad.layout is not strided:
            _check_kind("grads", labels, i, grad, dtype, device)


def _checked_state(
    rule: Rule, pick: _Pick, grads: list[Tensor], state: Mapping[str, SomeTensors] | None, step: int
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
    groups = [pick.listed(f"state[{name!r}]", state[name]) for name in names]
    for name, group in zip(names, groups, strict=True):
        label, device = f"state[{name!r}]", grads[0].device if grads else None
        for i, (tensor, grad) in enumerate(zip(group, grads, strict=True)):
            if tensor.shape != grad.shape:
                raise ValueError(
                    f"{_entry(label, pick.labels, i)}: expected the gradient's shape {tuple(grad.shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
            if tensor.dtype is not grad.dtype or tensor.device != device or tensor.layout is not torch.strided:
                _check_kind(label, pick.labels, i, tensor, grad.dtype, grad.device)
    return groups


def _check_in_place(
    rule: Rule, labels: Labels, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]]
) -> None:
    named = zip(("params", *(f"state[{name!r}]" for name in rule.state_names)), (params, *states), strict=True)
    for name, group in named:
        for i, (tensor, grad) in enumerate(zip(group, grads if group else (), strict=True)):
            if tensor.shape != grad.shape:
                raise ValueError(
                    f"{_entry(name, labels, i)}: expected the gradient's shape {tuple(grad.shape)}, to be updated in "
                    f"place, got {tuple(tensor.shape)}"
                )
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise ValueError(
                    f"{_entry(name, labels, i)}: expected a tensor that requires no gradient, to be updated in place; "
                    "detach it or call under torch.no_grad()"
                )


def _checked_rates(
    rule: Rule, pick: _Pick, grads: list[Tensor], rates: Mapping[str, Tensor | Tensors] | None
) -> list[list[Tensor]]:
    if rates is None:
        return [[] for _ in rule.rate_names]
    if not isinstance(rates, Mapping):
        raise TypeError(f"rates: expected None or a dict of tensors, got {_type(rates)}")
    unknown = [str(name) for name in rates if name not in rule.rate_names]
    if unknown:
        raise ValueError(f"rates: expected keys among {', '.join(rule.rate_names)}, got {', '.join(unknown)}")
    return [_checked_rate(name, rates[name], pick, grads) if name in rates else [] for name in rule.rate_names]


def _checked_rate(name: str, rate: Tensor | Tensors, pick: _Pick, grads: list[Tensor]) -> list[Tensor]:
    label = f"rates[{name!r}]"
    if isinstance(rate, Tensor):
        if rate.dim() != 0:
            raise ValueError(
                f"{label}: expected a tensor without dimensions, or a container of tensors as params, "
                f"got shape {tuple(rate.shape)}"
            )
        if rate.dtype not in DTYPES:
            raise TypeError(f"{label}: expected float32, float64, bfloat16 or float16, got {rate.dtype}")
        if grads and rate.device != grads[0].device:
            raise ValueError(f"{label}: expected the device {grads[0].device} of the parameters, got {rate.device}")
        return [rate]
    group, labels = pick.listed(label, rate), pick.labels
    for i, (tensor, grad) in enumerate(zip(group, grads, strict=True)):
        if tensor.dim() != 0 and tensor.shape != grad.shape[1:]:
            raise ValueError(
                f"{_entry(label, labels, i)}: expected no dimensions or the parameter's shape "
                f"{tuple(grad.shape[1:])}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{_entry(label, labels, i)}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}"
            )
        _check_kind(label, labels, i, tensor, tensor.dtype if tensor.dim() == 0 else grad.dtype, grad.device)
    return group


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
