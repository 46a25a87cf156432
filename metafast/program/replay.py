"""Replaying: every intermediate value has its place in one block of memory, so that views cost nothing and the operations
between them write where the next one reads."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from metafast.ops.layers import library as _library  # noqa: F401 - defines an op that is named below
from metafast.program.aliases import Aliases, Root, aliased_argument, reshapes_in_place, results, written_arguments
from metafast.program.memory import Arena, block
from metafast.program.rewrite import simplify
from metafast.program.stacks import parts_of_stacks
from metafast.program.trace import draws_random_numbers, record
from metafast.program.variants import writing

Call = Callable[[], object]


class Program:
    """``function(*inputs)`` for inputs of the same shapes, dtypes and devices, without Python, autograd or allocation.

    Args:
        function: gives a pytree of tensors; what :func:`metafast.program.record` asks of it holds.
        inputs: such as it will be called with.

    Attributes:
        bytes: of the intermediate values.
        reached: tensors that the function reads, or writes, besides its inputs.
        writes: of each input, whether the function changes it in place. Inputs themselves stay as they are.
        constant: of each tensor in the result, whether it depends on nothing, and is the same at every call.
        mode: of the tensors without data that were recorded.

    Raises:
        NotRecordableError: see :func:`metafast.program.record`.
    """

    def __init__(self, function: Callable[..., Any], inputs: list[Tensor]) -> None:
        recorded = record(function, [tensor.contiguous() for tensor in inputs])
        graph = recorded.module.graph
        nodes = list(graph.nodes)
        simplify(graph)
        nodes += graph.nodes
        self._structure = recorded.outputs
        self.reached = recorded.reached
        self.mode = recorded.mode
        self._lock = threading.Lock()
        # Inference tensors: operations on them pass autograd by.
        with torch.inference_mode():
            built = _Build(recorded.module, inputs)
            self._inputs, self._outputs, self._calls, self.bytes = built.inputs, built.outputs, built.calls, built.bytes
            self.writes, self.constant = built.writes, built.constant
            if inputs[0].device.type == "cuda":
                self._take(inputs)
                self._calls = [_as_cuda_graph(self._calls, inputs[0].device)]
        # Nodes refer to each other: their tensors without data would be there until the garbage collector comes.
        for node in nodes:
            node.meta.clear()

    def __call__(self, inputs: list[Tensor]) -> Any:
        """The function's result, in memory of its own."""
        with self._lock:
            with torch.inference_mode():
                self._take(inputs)
                for call in self._calls:
                    call()
            # Outside, so that these are tensors like any other.
            with torch.no_grad():
                leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._outputs]
        return pytree.tree_unflatten(leaves, self._structure)

    def _take(self, inputs: list[Tensor]) -> None:
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)


class _Build:
    """Memory and calls for a graph.

    Attributes:
        inputs, outputs: tensors that calls read and write; an output may be something else than a tensor.
        calls: to be made in this order.
        bytes: of intermediate values.
        writes: of each input, whether a call changes it.
        constant: of each output, whether no call makes it.
    """

    def __init__(self, module: fx.GraphModule, inputs: list[Tensor]) -> None:
        self._nodes = list(module.graph.nodes)
        self._aliases = Aliases(module.graph)
        self._constant: set[Root] = set()
        # What is more than a view of memory that is known beforehand, or than a constant.
        self._running = {node for node in self._nodes if self._runs(node)}
        self._values: dict[fx.Node, Any] = {}
        self._parts = parts_of_stacks(self._nodes, self._running, self._aliases)
        self._stacks = {part.stack for part in self._parts.values()}
        self._running -= self._stacks
        self._last_use = self._last_uses()
        # Calls that write over an argument of theirs.
        self._over: dict[fx.Node, fx.Node] = {}
        self._places, self.bytes = self._plan()
        device = inputs[0].device
        self._memory = block(self.bytes, device)
        self.inputs: list[Tensor] = []
        self.writes: list[bool] = []
        self.calls: list[Call] = []
        self.outputs: list[Any] = []
        self.constant: list[bool] = []
        for node in self._nodes:
            if node.op == "placeholder":
                given = node.meta["val"]
                self.inputs.append(torch.empty(given.shape, dtype=given.dtype, device=given.device))
                self._values[node] = self.inputs[-1]
                self.writes.append(Root(node, 0) in self._aliases.written)
            elif node.op == "get_attr":
                self._values[node] = operator.attrgetter(node.target)(module)
            elif node.op == "call_function":
                self._values[node] = self._call(node)
            elif node.op == "output":
                self.outputs = pytree.tree_leaves(self._now(node.args[0]))
                self.constant = [
                    isinstance(leaf, fx.Node) and all(root in self._constant for root in self._aliases.of(leaf))
                    for leaf in pytree.tree_leaves(node.args[0])
                ]

    def _runs(self, node: fx.Node) -> bool:
        """Asked in the order of the graph, since a constant is made of constants."""
        if node.op != "call_function" or node.target is operator.getitem:
            return False
        if written_arguments(node):
            return True
        return aliased_argument(node) is None and not self._is_constant(node)

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a call gives the same each time: nothing that it reads comes from an input, an attribute, or chance."""
        if draws_random_numbers(node) or self._aliases.meets_writes(node):
            return False
        if node.target not in _SHAPED_LIKE and any(root not in self._constant for _, root in self._aliases.read(node)):
            return False
        self._constant.update(self._aliases.of(node))
        return True

    def _last_uses(self) -> dict[Root, int]:
        """The position of the last call that reads or writes each piece of memory."""
        last: dict[Root, int] = {}
        for position, node in enumerate(self._nodes):
            if node.op == "output" or node in self._running:
                for _, root in self._aliases.read(node):
                    last[root] = position
                if node.op != "output":
                    for root in self._aliases.of(node):
                        last.setdefault(root, position)
        return last

    def _plan(self) -> tuple[dict[Root, int], int]:
        """The offset of everything that calls make, and the size of it all."""
        arena = Arena()
        places: dict[Root, int] = {}
        ending: dict[int, list[Root]] = {}
        sizes: dict[Root, int] = {}
        for root, position in self._last_use.items():
            ending.setdefault(position, []).append(root)
        for position, node in enumerate(self._nodes):
            if node in self._running and aliased_argument(node) is None:
                over = self._overwritable(node, position, places)
                for root, result in zip(self._aliases.of(node), results(node), strict=True):
                    if root in self._parts:
                        stack = self._parts[root].stack
                        (root,) = self._aliases.of(stack)
                        (result,) = results(stack)
                        if root in places:
                            continue
                    sizes[root] = _bytes(result)
                    if over is None:
                        places[root] = arena.take(sizes[root])
                    else:
                        self._over[node] = over
                        (taken,) = self._aliases.of(over)
                        places[root], sizes[taken] = places[taken], 0
            for root in ending.get(position, ()) if node.op != "output" else ():
                if root in places and sizes[root]:
                    arena.give_back(places[root], sizes[root])
        return places, arena.size

    def _overwritable(self, node: fx.Node, position: int, places: dict[Root, int]) -> fx.Node | None:
        """An argument that a call may write its result over, in memory that nobody reads afterwards.

        An elementwise call may with any of its arguments, a product that is added to something with that.
        """
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if len(results(node)) != 1 or not (pointwise or node.target in _ADDED_TO_FIRST):
            return None
        if any(root in self._parts for root in self._aliases.of(node)):
            return None
        (result,) = results(node)
        read = list(self._aliases.read(node))
        for value, root in read:
            whole = root in places and _bytes(results(root.node)[root.index]) == _bytes(result)
            views = {_layout(results(other)[0]) for other, of in read if of == root}
            allowed = pointwise or (value is node.args[0] and [of for _, of in read].count(root) == 1)
            if allowed and whole and self._last_use[root] == position and views == {_layout(result)}:
                return value
        return None

    def _call(self, node: fx.Node) -> Any:
        """What a node's value is, after its call was noted down, or made, if it is made but once."""
        target: Any = node.target
        args, kwargs = self._now(self._moved(node)), self._now(node.kwargs)
        if reshapes_in_place(node):
            # The argument's other uses, before, are of its shape then.
            return target(torch.ops.aten.alias(args[0]), *args[1:], **kwargs)
        if node in self._stacks:
            return self._stacked(node)
        if node not in self._running:
            return target(*args, **kwargs)
        base = aliased_argument(node)
        if base is not None or not results(node):
            self.calls.append(functools.partial(target, *args, **kwargs))
            return None if base is None else self._values[base]
        outputs = (
            [self._values[self._over[node]]]
            if node in self._over
            else [self._place(root, like) for root, like in zip(self._aliases.of(node), results(node), strict=True)]
        )
        given = iter(outputs)
        value = pytree.tree_map(lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, node.meta["val"])
        self.calls.append(writing(target, args, kwargs, value))
        return value

    def _moved(self, node: fx.Node) -> tuple[Any, ...]:
        """The node's arguments, with an offset that counts from where memory began as counted from where it begins here."""
        position = _OFFSETS.get(node.target)
        if position is None or len(node.args) <= position or node.args[position] is None:
            return node.args
        base: Any = node.args[0]
        (recorded,) = results(base)
        args: list[Any] = list(node.args)
        args[position] += self._values[base].storage_offset() - recorded.storage_offset()
        return tuple(args)

    def _stacked(self, stack: fx.Node) -> Tensor:
        """The tensor of a stack that its parts are made in."""
        if stack not in self._values:
            (root,) = self._aliases.of(stack)
            self._values[stack] = self._place(root, results(stack)[0])
        return self._values[stack]

    def _place(self, root: Root, like: Tensor) -> Tensor:
        if root in self._parts:
            return self._parts[root].within(self._stacked(self._parts[root].stack))
        tensor = torch.empty(0, dtype=like.dtype, device=like.device)
        return tensor.set_(self._memory, self._places[root] // like.element_size(), like.shape, like.stride())

    def _now(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, self._values.__getitem__)


def _as_cuda_graph(calls: list[Call], device: torch.device) -> Call:
    """One call that replays all of them."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # Once before, on a stream of its own: kernels are compiled and libraries set up, which a capture may not do.
    with torch.cuda.stream(stream), torch.random.fork_rng([device]):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


# Their results depend on the shape of their argument alone.
_SHAPED_LIKE = {
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_full.default,
}


# Their result is their first argument and something else, which may take its place.
_ADDED_TO_FIRST = {torch.ops.aten.baddbmm.default, torch.ops.metafast.sum_of_products.default}


# The position of the argument that is an offset into memory.
_OFFSETS: dict[Any, int] = {
    torch.ops.aten.as_strided.default: 3,
    torch.ops.aten.as_strided_copy.default: 3,
    torch.ops.aten.as_strided_scatter.default: 4,
}


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()


def _bytes(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return (
        1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    ) * tensor.element_size()
