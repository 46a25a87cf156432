"""The first replays of a program beside the function that was recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metafast.engine.capture_call import Call
from metafast.engine.freed_memory import give_back
from metafast.engine.module_attributes import Attributes
from metafast.engine.replay_state import RandomState
from metafast.program import Program

# A replay does the same operations; kernels that choose their order of additions by memory layout round differently.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUGH = 0.05
# Of the norm of all outputs: what is smaller is a sum that cancels, all of it rounding.
_CANCELLED = 1e-3
# Of the time that recording took.
_SHARE = 1 / 3


class Check:
    """Compares the first replays that have other numbers than the recorded ones.

    Args:
        replays: how many are compared. Comparisons after the first take at most a third of the time of the recording.
        seconds: time that the recording took.
        inputs: the recorded inputs.
    """

    def __init__(self, replays: int, seconds: float, inputs: list[Tensor]) -> None:
        self._left = replays
        self._seconds = seconds * _SHARE
        # Held, so that no other tensor gets their memory.
        self._recorded = [(tensor, tensor._version) for tensor in inputs]

    def replay(
        self, program: Program, call: Call, inputs: list[Tensor], attributes: Callable[[], Attributes]
    ) -> tuple[Any, list[Tensor], Any]:
        """``program.run(inputs)``, compared with the function where a comparison is due.

        Args:
            program: the recorded program.
            inputs: its inputs.
            call: the recorded call.
            attributes: of the model, as they are when it is called.

        Raises:
            RuntimeError: the two differ; names the first output that does.
        """
        if not self._left or all(map(_is_same, self._recorded, inputs)):
            replayed: tuple[Any, list[Tensor], Any] = program.run(inputs)
            return replayed
        found = self._compared(program, call, inputs, attributes)
        give_back()
        return found

    def _compared(
        self, program: Program, call: Call, inputs: list[Tensor], attributes: Callable[[], Attributes]
    ) -> tuple[Any, list[Tensor], Any]:
        started = time.perf_counter()
        before = RandomState(inputs[0].device)
        found: tuple[Any, list[Tensor], Any] = program.run(inputs)
        after, kept = RandomState(inputs[0].device), attributes()
        before.restore()
        try:
            changed: dict[str, bool] = {}
            expected = call.run(program.copied(inputs), changed)
        finally:
            after.restore()
            kept.restore()
        pairs = zip(found[:2], expected, strict=True)
        (result, reference), (values, buffers) = pairs
        named = [{"buffer": dict(zip(changed, tensors, strict=True))} for tensors in (values, buffers)]
        _compare((result, named[0]), (reference, named[1]), rough=_is_rough(inputs))
        spent = time.perf_counter() - started
        self._seconds -= spent
        self._left = self._left - 1 if self._seconds >= spent else 0
        self._recorded = self._recorded if self._left else []
        return found


def _is_same(recorded: tuple[Tensor, int], now: Tensor) -> bool:
    """Whether an input has the numbers that it was recorded with."""
    before, version = recorded
    if before.data_ptr() == now.data_ptr():
        return version == now._version
    return torch.equal(before, now)


def _is_rough(inputs: list[Tensor]) -> bool:
    """Whether something is computed in half precision."""
    return torch.is_autocast_enabled(inputs[0].device.type) or any(
        tensor.dtype in (torch.float16, torch.bfloat16) for tensor in inputs
    )


def _compare(found: Any, expected: Any, rough: bool) -> None:
    pairs = [
        (path, a, b)
        for (path, a), b in zip(pytree.tree_flatten_with_path(found)[0], pytree.tree_leaves(expected), strict=True)
        if isinstance(a, Tensor)
    ]
    sizes = [_norm(b) for _, _, b in pairs]
    norms = [size for size, (_, _, b) in zip(sizes, pairs, strict=True) if b.is_floating_point()]
    least = _CANCELLED * float(torch.tensor(norms).norm()) if norms else 0.0
    for size, (path, a, b) in zip(sizes, pairs, strict=True):
        tolerance = _ROUGH if rough else _TOLERANCE.get(b.dtype, _ROUGH)
        difference = _distance(a, b)
        # Not "greater": what is not a number differs.
        if not difference <= tolerance * max(size, least):
            raise RuntimeError(
                f"capture: a replay differs from the uncaptured call, first in {_shown(path)}, by {difference:.3g} where "
                f"the norm is {size:.3g}: model or loss_fn depend on something that was recorded once, such as a number in "
                "Python or a tensor that another one took the place of. Keep it in a buffer that changes in place, pass it "
                "in the batch, or use capture=False (capture_check=0 leaves this comparison out)"
            )


def _distance(a: Tensor, b: Tensor) -> float:
    """The norm of a difference. Equal infinities, and what is not a number on both sides, do not differ."""
    if a.dtype == b.dtype and b.dtype in _TOLERANCE:
        # Copies in double precision of large gradients take as long as a good part of the step.
        distance = float(torch.linalg.vector_norm(a.detach() - b.detach(), dtype=torch.float64))
        if math.isfinite(distance):
            return distance
    a, b = a.detach().double(), b.detach().double()
    return float(torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).norm())


def _norm(tensor: Tensor) -> float:
    """The norm of the finite values."""
    tensor = tensor.detach()
    if tensor.dtype in _TOLERANCE:
        norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        if math.isfinite(norm):
            return norm
    return float(tensor.double().nan_to_num(0.0, 0.0, 0.0).norm())


def _shown(path: tuple[Any, ...]) -> str:
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return " ".join(name for name in names if not name.isdecimal()) or "the loss"
