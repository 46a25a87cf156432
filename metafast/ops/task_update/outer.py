"""Outer updates, over a whole parameter list in one call: Reptile's step, means over tasks, moving averages.

All three are base + scale · Σ_t weight_t (value_t − base), each tensor read once and written once. They end a meta-step and
are differentiated by nobody, so the kernels are not: where a gradient is required the plain formula runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from metafast.backend import resolve_backend
from metafast.ops.task_update import library
from metafast.ops.task_update.numerics import master
from metafast.ops.task_update.validation import DTYPES, Tensors, reasons_against_fused

__all__ = ["moving_average", "reptile_update", "task_mean"]

Container = TypeVar("Container", bound=Tensors)


def reptile_update(
    params: Container,
    adapted: Tensors,
    lr: float,
    *,
    reduction: str = "mean",
    weights: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Container:
    """Reptile's outer step θ + lr · mean_t (θ_t − θ) (Nichol et al., "On first-order meta-learning algorithms", 2018).

    Args:
        params: list, tuple or dict of tensors ``[*shape]``; float32, float64, bfloat16 or float16.
        adapted: the tasks' parameters ``[T, *shape]``, T ≥ 1, in a container as ``params``, with its dtypes.
        lr: the outer rate.
        reduction: ``"mean"`` or ``"sum"`` over tasks.
        weights: ``[T]``, what each task counts; None for the same. With ``"mean"`` they are divided by their sum.
        inplace: write over ``params``, which must then require no gradient, and return them.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``; see :mod:`metafast.backend`.

    Returns:
        The new parameters ``[*shape]``, in a container of the type of ``params``.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: ``backend="fused"`` without a kernel for the device, or where a gradient is required.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    values = _listed("adapted", adapted, params)
    tasks = _count_tasks("adapted", values)
    bases = _checked_bases("params", _listed("params", params, params), values, tasked=True)
    scale, weights = _weighted(lr, tasks, weights, values[0], mean=reduction == "mean")
    return _contained(_outer("reptile_update", bases, values, weights, scale, inplace, backend), params)


def task_mean(tensors: Container, weights: Tensor | None = None, *, backend: str | None = None) -> Container:
    """The mean over tasks, such as of meta-gradients: Σ_t w_t x_t / Σ_t w_t.

    Args:
        tensors: list, tuple or dict of tensors ``[T, *shape]``, T ≥ 1; float32, float64, bfloat16 or float16.
        weights: ``[T]``, what each task counts; None for the same.
        backend: as in :func:`reptile_update`.

    Returns:
        Tensors ``[*shape]``, in a container of the type of ``tensors``.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as :func:`reptile_update`.
    """
    values = _listed("tensors", tensors, tensors)
    tasks = _count_tasks("tensors", values)
    scale, weights = _weighted(1.0, tasks, weights, values[0], mean=True)
    return _contained(_outer("task_mean", [], values, weights, scale, False, backend), tensors)


def moving_average(
    averages: Container, params: Tensors, decay: float, *, inplace: bool = False, backend: str | None = None
) -> Container:
    """The exponential moving average decay · average + (1 − decay) · θ.

    Args:
        averages: list, tuple or dict of tensors ``[*shape]``; float32, float64, bfloat16 or float16.
        params: tensors ``[*shape]``, in a container as ``averages``, with its dtypes.
        decay: from 0, which takes the parameters, to 1, which keeps the average.
        inplace: write over ``averages``, which must then require no gradient, and return them.
        backend: as in :func:`reptile_update`.

    Returns:
        The new averages, in a container of the type of ``averages``.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as :func:`reptile_update`.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number from 0 to 1, got {decay}")
    values = _listed("params", params, averages)
    bases = _checked_bases("averages", _listed("averages", averages, averages), values, tasked=False)
    rows = [value.unsqueeze(0) for value in values]
    return _contained(_outer("moving_average", bases, rows, None, 1 - decay, inplace, backend), averages)


def _outer(
    op: str,
    bases: list[Tensor],
    values: list[Tensor],
    weights: Tensor | None,
    scale: float,
    inplace: bool,
    backend: str | None,
) -> list[Tensor]:
    given = [*bases, *values, *([] if weights is None else [weights])]
    required = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if inplace and required:
        raise ValueError(
            "inplace: expected tensors that require no gradient; detach them or call under torch.no_grad()"
        )
    reasons = reasons_against_fused(values[0].device)
    if required or torch._C._are_functorch_transforms_active():
        reasons = [*reasons, "outer updates have no derivatives; call it under torch.no_grad()"]
    if resolve_backend(op, backend, reasons) == "fused":
        listed = [] if weights is None else [weights.contiguous()]
        if not inplace:
            return library.outer_update(bases, values, listed, scale)
        if all(base.is_contiguous() for base in bases):
            library.outer_update_in_place(bases, values, listed, scale)
            return bases
        news = library.outer_update(bases, values, listed, scale)
    else:
        news = _reference(bases, values, weights, scale)
        if not inplace:
            return news
    for base, new in zip(bases, news, strict=True):
        base.copy_(new)
    return bases


def _reference(bases: list[Tensor], values: list[Tensor], weights: Tensor | None, scale: float) -> list[Tensor]:
    results = []
    for i, value in enumerate(values):
        base = master(bases[i]) if bases else None
        differences = master(value) if base is None else master(value) - base
        if weights is not None:
            differences = differences * weights.to(differences.dtype).view(-1, *[1] * (value.dim() - 1))
        step = scale * differences.sum(0)
        results.append((step if base is None else base + step).to(value.dtype))
    return results


def _weighted(
    scale: float, tasks: int, weights: Tensor | None, like: Tensor, mean: bool
) -> tuple[float, Tensor | None]:
    """Scale and weights, divided by the tasks' number or the weights' sum for a mean."""
    if weights is None:
        return (scale / tasks if mean else scale), None
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a tensor, got {type(weights).__name__}")
    if weights.shape != (tasks,):
        raise ValueError(f"weights: expected shape ({tasks},), a number for each task, got {tuple(weights.shape)}")
    if weights.dtype not in DTYPES:
        raise TypeError(f"weights: expected float32, float64, bfloat16 or float16, got {weights.dtype}")
    if weights.device != like.device:
        raise ValueError(f"weights: expected the device {like.device} of the tensors, got {weights.device}")
    weights = master(weights)
    return scale, weights / weights.sum() if mean else weights


def _listed(name: str, tensors: Tensors, like: Tensors) -> list[Tensor]:
    if not isinstance(tensors, (list, tuple, Mapping)):
        raise TypeError(f"{name}: expected a list, tuple or dict of tensors, got {type(tensors).__name__}")
    if isinstance(tensors, Mapping) != isinstance(like, Mapping):
        raise TypeError(f"{name}: expected a container as that of the other tensors, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    if len(tensors) != len(like) or (isinstance(like, Mapping) and tensors.keys() != like.keys()):  # type: ignore[union-attr]
        raise ValueError(f"{name}: expected as many tensors as the other container has, under its keys")
    keys: Any = like
    listed = [tensors[key] for key in keys] if isinstance(tensors, Mapping) else list(tensors)
    for i, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}[{i}]: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != listed[0].device:
            raise ValueError(
                f"{name}[{i}]: expected the device {listed[0].device} of the first tensor, got {tensor.device}"
            )
    return listed


def _count_tasks(name: str, tensors: list[Tensor]) -> int:
    tasks = tensors[0].shape[:1]
    for i, tensor in enumerate(tensors):
        if tensor.shape[:1] != tasks or 0 in tensor.shape[:1] or tensor.dim() == 0:
            raise ValueError(
                f"{name}[{i}]: expected the same number of tasks, at least 1, as first dimension, "
                f"got shape {tuple(tensor.shape)}"
            )
    return tasks[0]


def _checked_bases(name: str, bases: list[Tensor], values: list[Tensor], tasked: bool) -> list[Tensor]:
    for i, (base, value) in enumerate(zip(bases, values, strict=True)):
        expected = (value.shape[tasked:], value.dtype, value.device)
        if (base.shape, base.dtype, base.device) != expected:
            raise ValueError(
                f"{name}[{i}]: expected shape {tuple(expected[0])}, {value.dtype} and {value.device}, as the other "
                f"tensor has, got {tuple(base.shape)}, {base.dtype} and {base.device}"
            )
    return bases


def _contained(tensors: list[Tensor], like: Any) -> Any:
    if isinstance(like, Mapping):
        return dict(zip(like, tensors, strict=True))
    return tuple(tensors) if isinstance(like, tuple) else tensors
