"""Recording: the operations that a function runs, below autograd and vmap, as a graph."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metafast.program.aliases import Aliases, reshapes_in_place

_lock = threading.Lock()


class _Recording(threading.local):
    value = False


_recording = _Recording()


def is_recording() -> bool:
    """Whether this thread runs a function to record it, on tensors without data."""
    return _recording.value


class NotRecordableError(RuntimeError):
    """The function does something that a replay would not repeat."""


class Recorded:
    """A graph of operations on tensors, and the structure of their results.

    Attributes:
        module: one placeholder per input, one flat list of outputs. Tensors that the function reached in other ways, such as
            buffers, are attributes of it, by reference.
        outputs: the structure of the function's result.
        reached: the tensors that were reached in other ways.
        mode: the mode of the tensors without data.
    """

    def __init__(self, module: fx.GraphModule, outputs: pytree.TreeSpec, mode: FakeTensorMode) -> None:
        self.module = module
        self.outputs = outputs
        self.mode = mode
        attributes = [getattr(module, node.target) for node in module.graph.nodes if node.op == "get_attr"]
        self.reached = [value for value in attributes if isinstance(value, Tensor)]


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
    structure: list[pytree.TreeSpec] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        with _RefusingLooks(), _RefusingCopies():
            leaves, spec = pytree.tree_flatten(function(*tensors))
        structure.append(spec)
        return leaves

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tracing = make_fx(flat, tracing_mode="real", _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False)
    try:
        # In the mode, what the function makes is without data too, and what it changes by closure stays as it is.
        with _lock, _watching_random_state() as put_back, mode, _recorded_thread():
            # Not views of anything, so that an offset in memory means the same in a replay.
            fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs]
            module = tracing(*fakes)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise NotRecordableError(f"{_LOOKS} {error}") from error
    except NotImplementedError as error:
        # Up to torch 2.11 a graph cannot hold one.
        if "Generator" not in str(error):
            raise
        raise NotRecordableError(_DRAWS_ELSEWHERE) from error
    if put_back and any(draws_random_numbers(node) for node in module.graph.nodes):
        raise NotRecordableError(
            "the computation draws random numbers and sets the random state, which a replay would not: either a seed, or "
            "dropout in a part that is recomputed in the backward pass; record it without checkpointing or dropout"
        )
    for node in module.graph.nodes:
        if isinstance(node.target, OpOverload):
            _check_repeatable(node.target, node)
        elif node.op == "get_attr" and isinstance(getattr(module, node.target), torch.Generator):
            raise NotRecordableError(_DRAWS_ELSEWHERE)
    if any(root.node.op == "get_attr" for root in Aliases(module.graph).written):
        raise NotRecordableError(
            "the computation changes a tensor in place that is neither an input nor made by it; register it as a buffer"
        )
    return Recorded(module, structure[0], mode)


@contextmanager
def _recorded_thread() -> Iterator[None]:
    _recording.value = True
    try:
        yield
    finally:
        _recording.value = False


class _RefusingLooks(TorchDispatchMode):
    """Refuses to tell Python the value of a tensor that the function did not make: it may be another one at a replay."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], FakeTensor):
            raise NotRecordableError(f"{_LOOKS} {func}; so does a tensor without dimensions as an index")
        return func(*args, **(kwargs or {}))


class _RefusingCopies(TorchFunctionMode):
    """The same for values that are read from memory, which no operation tells of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and not isinstance(args[0], FakeTensor):
            raise NotRecordableError(f"{_LOOKS} Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether an operation draws random numbers, so that its result is another one each time."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _check_repeatable(op: OpOverload, node: fx.Node) -> None:
    looks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags)
    if looks and op not in _SHAPES_KNOWN:
        raise NotRecordableError(f"{_LOOKS} {op}")
    if (torch.Tag.inplace_view in op.tags and not reshapes_in_place(node)) or _resizes(op, node):
        raise NotRecordableError(
            f"the computation changes the shape or the memory of a tensor in place ({op}), where a replay has all shapes "
            "and places decided"
        )
    if sum(value.alias_info is not None for value in op._schema.returns) > 1:
        raise NotRecordableError(f"the computation has several results put into given tensors ({op})")


# With masks their shapes depend on values, but those are refused while recording.
_SHAPES_KNOWN = {torch.ops.aten.index.Tensor, torch.ops.aten.repeat_interleave.Tensor}
_DRAWS_ELSEWHERE = "the computation draws from a generator of its own, which a replay would not seed again"
_LOOKS = "the computation depends on the values of tensors in Python, which a replay would not look at again:"


def _resizes(op: OpOverload, node: fx.Node) -> bool:
    """Whether an operation is given a tensor of another shape for its result."""
    outputs = [node.kwargs.get(argument.name) for argument in op._schema.arguments if argument.is_out]
    given = [output.meta["val"].shape for output in outputs if isinstance(output, fx.Node)]
    return bool(given) and given != [leaf.shape for leaf in pytree.tree_leaves(node.meta["val"])]


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
