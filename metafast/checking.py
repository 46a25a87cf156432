"""The accelerated path beside the reference path, on the user's own model and data: errors, time and memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metafast.algorithms.learner import MetaLearner
from metafast.backend import use_backend
from metafast.engine.sharded_parameters import refuse_sharded
from metafast.engine.task_batch import check_count
from metafast.measure import interleaved_medians, peak_memory

__all__ = ["Report", "check"]


@dataclass(frozen=True)
class Report:
    """The meta-gradient of the accelerated path beside that of the reference path.

    Attributes:
        errors: ‖accelerated − exact‖ / ‖exact‖ of each parameter's gradient, where exact is the reference in float64. A
            gradient that is 0 but for rounding (of a key's bias, for example, which the softmax cancels) is divided by the
            norm over all parameters instead.
        error: the same over all parameters together.
        reference_error: the same for the reference path in the model's own dtype: the rounding that any implementation has.
        loss: the meta-loss of the accelerated path.
        exact_loss: the meta-loss of the reference in float64.
        seconds: time of a loss and its backward on the accelerated path, the median of interleaved runs in the model's own
            dtype.
        reference_seconds: the same for the reference path.
        peak_bytes: the most memory that tensors made in such a run took at once, on the accelerated path.
        reference_peak_bytes: the same for the reference path.
    """

    errors: dict[str, float]
    error: float
    reference_error: float
    loss: float
    exact_loss: float
    seconds: float
    reference_seconds: float
    peak_bytes: int
    reference_peak_bytes: int

    @property
    def max_error(self) -> float:
        """The largest of ``errors``."""
        return max(self.errors.values())

    def __str__(self) -> str:
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:5]
        width = max(len(name) for name, _ in worst)
        lines = [
            f"meta-gradient: error {self.error:.1e} against float64 (reference path: {self.reference_error:.1e})",
            f"loss: {self.loss:.6f}, float64: {self.exact_loss:.6f}",
            f"seconds: {self.seconds:.4f}, reference path: {self.reference_seconds:.4f}"
            f" ({self.reference_seconds / self.seconds:.2f} times as long)",
            f"peak memory: {self.peak_bytes / 2**20:.1f} MiB, reference path: {self.reference_peak_bytes / 2**20:.1f} MiB",
            "largest errors:",
            *(f"  {name:<{width}}  {error:.1e}" for name, error in worst),
        ]
        return "\n".join(lines)


def check(meta: MetaLearner, support: Any, query: Any = None, *, backend: str = "auto", rounds: int = 5) -> Report:
    """Compares ``meta``'s gradient, as it runs, with the reference path in float64, and times both paths.

    Nothing of ``meta`` is changed: gradients that its parameters hold stay, and randomness is the same in every run.

    Args:
        meta: any algorithm of this package, such as :class:`metafast.MAML`.
        support: as in a call of ``meta``.
        query: as in a call of ``meta``; None where the algorithm needs none.
        backend: backend of the path that is checked.
        rounds: timed runs of each path.

    Raises:
        TypeError: ``meta`` is not such an algorithm.
        ValueError: ``rounds`` is not at least 1, or the model is sharded.
    """
    if not isinstance(meta, MetaLearner):
        raise TypeError(f"meta: expected a metafast algorithm such as metafast.MAML, got {type(meta).__name__}")
    check_count("rounds", rounds, minimum=1)
    refuse_sharded(meta, "meta", "check the learner before its model is sharded")
    batches = (support,) if query is None else (support, query)
    mine = copy.deepcopy(meta)
    device = next(meta.parameters()).device

    loss, found = _gradient(mine, batches, backend)
    _, reference = _gradient(mine, batches, "reference")
    exact_loss, expected = _exact_gradient(meta, batches)
    paths = {name: lambda name=name: _gradient(mine, batches, name) for name in (backend, "reference")}
    seconds = interleaved_medians(paths, rounds, device)
    peaks = {name: peak_memory(path, device) for name, path in paths.items()}
    whole = _norm(list(expected.values()))
    return Report(
        errors={name: _distance([found[name]], [expected[name]], whole) for name in expected},
        error=_distance(list(found.values()), list(expected.values())),
        reference_error=_distance(list(reference.values()), list(expected.values())),
        loss=loss,
        exact_loss=exact_loss,
        seconds=seconds[backend],
        reference_seconds=seconds["reference"],
        peak_bytes=peaks[backend],
        reference_peak_bytes=peaks["reference"],
    )


def meta_gradient_error(meta: MetaLearner, *batches: Any, backend: str = "auto") -> float:
    """``check(...).error`` alone: ‖accelerated − exact‖ / ‖exact‖ over all parameters."""
    _, found = _gradient(copy.deepcopy(meta), batches, backend)
    _, expected = _exact_gradient(meta, batches)
    return _distance(list(found.values()), list(expected.values()))


def _exact_gradient(meta: MetaLearner, batches: tuple[Any, ...]) -> tuple[float, dict[str, Tensor]]:
    return _gradient(copy.deepcopy(meta).double(), pytree.tree_map(_to_float64, batches), "reference")


def _gradient(meta: MetaLearner, batches: tuple[Any, ...], backend: str) -> tuple[float, dict[str, Tensor]]:
    device = next(meta.parameters()).device
    meta.zero_grad()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), use_backend(backend), torch.enable_grad():
        torch.manual_seed(0)
        loss = meta(*batches)
        loss.backward()
    named = {name: p for name, p in meta.named_parameters() if p.requires_grad}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    # What the next call would release is no part of its memory.
    meta.zero_grad()
    meta.outcome = None
    return loss.item(), gradients


def _distance(found: list[Tensor], expected: list[Tensor], whole: float = 0.0) -> float:
    """‖found − expected‖ / ‖expected‖.

    Where expected is 0 but for rounding beside ``whole``, ``whole`` is the divisor. Where that is 0 too, nothing divides.
    """
    difference = _norm([a.double() - b.double() for a, b in zip(found, expected, strict=True)])
    size = _norm(expected)
    # Of float64, in which the exact gradient is computed, and of some thousands of sums.
    if size < 1e4 * torch.finfo(torch.float64).eps * whole:
        size = whole
    return difference / size if size > 0.0 else difference


def _norm(tensors: list[Tensor]) -> float:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm().item()


def _to_float64(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
