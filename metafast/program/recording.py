"""Recording: the operations that a function runs, below autograd and vmap, as a graph."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metafast.program.aliases import Aliases, reshapes_in_place
from metafast.program.errors import NotRecordableError
from metafast.program.graph import OUTPUT, TENSOR, Form, Node, leaves
from metafast.program.tracing import DRAWS_ELSEWHERE, LOOKS, Tracing

_lock = threading.Lock()


class _Recording(threading.local):
    value = False


_recording = _Recording()


def is_recording() -> bool:
    """Whether this thread runs a function to record it, on tensors without data."""
    return _recording.value


class Recorded:
    """Operations on tensors, and the structure of their results.

    Attributes:
        nodes: the inputs in order, tensors that the function reached in other ways, such as buffers, calls in the order in
            which they ran, and at the end a flat list of the results.
        outputs: the structure of the function's result.
        reached: the tensors that were reached in other ways.
        mode: the mode of the tensors without data.
    """

    def __init__(self, nodes: list[Node], outputs: pytree.TreeSpec, mode: FakeTensorMode) -> None:
        self.nodes = nodes
        self.outputs = outputs
        self.mode = mode
        self.reached: list[Tensor] = [node.target for node in nodes if node.kind == TENSOR]


def record(function: Callable[..., Any], inputs: list[Tensor]) -> Recorded:
    """Runs ``function(*inputs)`` on tensors without data, and returns its operations.

    Args:
        function: gives a pytree of tensors. Its Python runs once, now.
        inputs: dense tensors; only their shapes, strides, dtypes and devices matter.

    Raises:
        NotRecordableError: Python looks at the values of tensors, a shape depends on them, a tensor changes its shape or
            memory in place, a tensor that is no input is changed, or random numbers come from elsewhere than torch's
            random state.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tracing = Tracing(mode)
    try:
        # In the mode, what the function makes is without data too, and what it changes by closure stays as it is.
        with _lock, _watching_random_state() as put_back, mode, _all_operations_seen(), _recorded_thread():
            # Not views of anything, so that an offset in memory means the same in a replay.
            fakes = [
                tracing.input(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)) for t in inputs
            ]
            with tracing, _RefusingCopies():
                leaves, structure = pytree.tree_flatten(function(*fakes))
            results = tracing.nodes_of(leaves)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise NotRecordableError(f"{LOOKS} {error}") from error
    nodes = [*tracing.nodes, Node(OUTPUT, args=(results,))]
    if put_back and any(map(draws_random_numbers, nodes)):
        raise NotRecordableError(
            "the computation draws random numbers and sets the random state, which a replay would not: either a seed, or "
            "dropout in a part that is recomputed in the backward pass; record it without checkpointing or dropout"
        )
    for node in nodes:
        if isinstance(node.target, OpOverload):
            _check_repeatable(node.target, node)
    if any(root.node.kind == TENSOR for root in Aliases(nodes).written):
        raise NotRecordableError(
            "the computation changes a tensor in place that is neither an input nor made by it; register it as a buffer"
        )
    return Recorded(nodes, structure, mode)


@contextmanager
def _all_operations_seen() -> Iterator[None]:
    """Inside, no operation is left out because somebody keeps its result, or replaced since somebody compiled it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _recorded_thread() -> Iterator[None]:
    _recording.value = True
    try:
        yield
    finally:
        _recording.value = False


class _RefusingCopies(TorchFunctionMode):
    """Refuses to tell Python the values of a tensor that the function did not make, where no operation tells of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and not isinstance(args[0], FakeTensor):
            raise NotRecordableError(f"{LOOKS} Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def draws_random_numbers(node: Node) -> bool:
    """Whether an operation draws random numbers, so that its result is another one each time."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _check_repeatable(op: OpOverload, node: Node) -> None:
    looks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags)
    if looks and op not in _SHAPES_KNOWN:
        raise NotRecordableError(f"{LOOKS} {op}")
    if any(isinstance(argument, torch.Generator) for argument in (*node.args, *node.kwargs.values())):
        raise NotRecordableError(DRAWS_ELSEWHERE)
    if (torch.Tag.inplace_view in op.tags and not reshapes_in_place(node)) or _resizes(op, node):
        raise NotRecordableError(
            f"the computation changes the shape or the memory of a tensor in place ({op}), where a replay has all shapes "
            "and places decided"
        )
    if sum(value.alias_info is not None for value in op._schema.returns) > 1:
        raise NotRecordableError(f"the computation has several results put into given tensors ({op})")


# With masks their shapes depend on values, but those are refused while recording.
_SHAPES_KNOWN = {torch.ops.aten.index.Tensor, torch.ops.aten.repeat_interleave.Tensor}


def _resizes(op: OpOverload, node: Node) -> bool:
    """Whether an operation is given a tensor of another shape for its result."""
    outputs = [node.kwargs.get(argument.name) for argument in op._schema.arguments if argument.is_out]
    given = [output.value.shape for output in outputs if isinstance(output, Node)]
    return bool(given) and given != [form.shape for form in leaves(Form, node.value)]


@contextmanager
def _watching_random_state() -> Iterator[list[str]]:
    """Collects the names of functions that set the random state, and puts the random state back afterwards.

    Raises:
        NotRecordableError: Python's random numbers were drawn.
    """
    seen: list[str] = []
    # torch has them under both names.
    places = [(place, name) for name in ("set_rng_state", "manual_seed", "seed") for place in (torch, torch.random)]
    originals = [getattr(place, name) for place, name in places]

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return original(*args, **kwargs)

        return function

    before, python_before = torch.get_rng_state(), random.getstate()
    for (place, name), original in zip(places, originals, strict=True):
        setattr(place, name, watched(name, original))
    try:
        yield seen
        if random.getstate() != python_before:
            random.setstate(python_before)
            raise NotRecordableError(
                "the computation draws Python's random numbers, which a replay would not draw again"
            )
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)
        torch.set_rng_state(before)
