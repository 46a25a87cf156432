"""Recording: the operations that a function runs, below autograd and vmap, as a graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

_lock = threading.Lock()


class NotRecordableError(RuntimeError):
    """The function does something that a replay would not repeat."""


class Recorded:
    """A graph of operations on tensors, and the structure of what they give.

    Attributes:
        module: one placeholder an input, one flat list of outputs. Tensors that the function reached in other ways (buffers,
            say) are attributes of it, by reference.
        outputs: how the outputs make up the function's result.
    """

    def __init__(self, module: fx.GraphModule, outputs: pytree.TreeSpec) -> None:
        self.module = module
        self.outputs = outputs


def record(function: Callable[..., Any], inputs: list[Tensor]) -> Recorded:
    """Runs ``function(*inputs)`` on tensors without data, and returns what it did.

    Args:
        function: gives a pytree of tensors. What it computes in Python is computed once, now.
        inputs: dense tensors; only their shapes, strides, dtypes and devices matter.

    Raises:
        NotRecordableError: Python looks at the values of tensors, a shape depends on them, or random numbers are drawn
            again after their state was put back.
    """
    structure: list[pytree.TreeSpec] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(function(*tensors))
        structure.append(spec)
        return leaves

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in inputs]
    try:
        with _lock, _watching_random_state() as replayed:
            module = make_fx(flat, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise NotRecordableError(
            f"the computation depends on the values of tensors in Python, which a replay would not look at again: {error}"
        ) from error
    if replayed and any(draws_random_numbers(node) for node in module.graph.nodes):
        raise NotRecordableError(
            "the computation draws the same random numbers twice by putting the random state back (dropout in a part "
            "that is recomputed in the backward pass), which a replay cannot: record it without checkpointing or dropout"
        )
    return Recorded(module, structure[0])


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether an operation's result is another one each time."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


@contextmanager
def _watching_random_state() -> Iterator[list[bool]]:
    """A list that is no longer empty once the random state was set inside."""
    seen: list[bool] = []
    original = torch.random.set_rng_state

    def set_rng_state(new_state: Tensor) -> None:
        seen.append(True)
        original(new_state)

    torch.random.set_rng_state = set_rng_state
    try:
        yield seen
    finally:
        torch.random.set_rng_state = original
