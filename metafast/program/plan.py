"""Planning a program: which operations of a recorded graph run at each call, and where their results lie in memory."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from metafast.ops.layers import library as _library  # noqa: F401 - defines an op that is named below
from metafast.program.aliases import Aliases, Root, aliased_argument, results, written_arguments
from metafast.program.arena import Arena
from metafast.program.recording import draws_random_numbers
from metafast.program.stack_elision import Part, parts_of_stacks


class Plan:
    """The plan of a program: for each node of a graph, whether and when it runs and where its result lies.

    Attributes:
        nodes: nodes of the graph, in order.
        aliases: the memory that each node reads and writes.
        running: nodes that are called at each replay. The others are views of memory that is known beforehand, or constants.
        constant: memory whose contents depend on nothing, and are computed once.
        parts: for memory that is part of a stack, its place in the stack.
        stacks: nodes that need no call, since their parts are made in their memory.
        overwritten: for calls that write their result over an argument, this argument.
        places: offsets of the results of calls, in one block of memory.
        bytes: size of that block.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.aliases = Aliases(graph)
        self.constant: set[Root] = set()
        self.running = {node for node in self.nodes if self._runs(node)}
        self.parts: dict[Root, Part] = parts_of_stacks(self.nodes, self.running, self.aliases)
        self.stacks = {part.stack for part in self.parts.values()}
        self.running -= self.stacks
        self._last_use = self._last_uses()
        self.overwritten: dict[fx.Node, fx.Node] = {}
        self.places, self.bytes = self._placed()

    def _runs(self, node: fx.Node) -> bool:
        """Whether a node is called at each replay. To be asked in the order of the graph: constants depend on constants."""
        if node.op != "call_function" or node.target is operator.getitem:
            return False
        if written_arguments(node):
            return True
        return aliased_argument(node) is None and not self._is_constant(node)

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a call gives the same each time: nothing that it reads comes from an input, an attribute, or chance."""
        if draws_random_numbers(node) or self.aliases.meets_writes(node):
            return False
        if node.target not in _SHAPED_LIKE and any(root not in self.constant for _, root in self.aliases.read(node)):
            return False
        self.constant.update(self.aliases.of(node))
        return True

    def _last_uses(self) -> dict[Root, int]:
        """The position of the last call that reads or writes each piece of memory."""
        last: dict[Root, int] = {}
        for position, node in enumerate(self.nodes):
            if node.op == "output" or node in self.running:
                for _, root in self.aliases.read(node):
                    last[root] = position
                if node.op != "output":
                    for root in self.aliases.of(node):
                        last.setdefault(root, position)
        return last

    def _placed(self) -> tuple[dict[Root, int], int]:
        """The offset of each result of a call, and the size of the block."""
        arena = Arena()
        places: dict[Root, int] = {}
        ending: dict[int, list[Root]] = {}
        sizes: dict[Root, int] = {}
        for root, position in self._last_use.items():
            ending.setdefault(position, []).append(root)
        for position, node in enumerate(self.nodes):
            if node in self.running and aliased_argument(node) is None:
                over = self._overwritable(node, position, places)
                for root, result in zip(self.aliases.of(node), results(node), strict=True):
                    if root in self.parts:
                        stack = self.parts[root].stack
                        (root,) = self.aliases.of(stack)
                        (result,) = results(stack)
                        if root in places:
                            continue
                    sizes[root] = _bytes(result)
                    if over is None:
                        places[root] = arena.take(sizes[root])
                    else:
                        self.overwritten[node] = over
                        (taken,) = self.aliases.of(over)
                        places[root], sizes[taken] = places[taken], 0
            for root in ending.get(position, ()) if node.op != "output" else ():
                if root in places and sizes[root]:
                    arena.give_back(places[root], sizes[root])
        return places, arena.size

    def _overwritable(self, node: fx.Node, position: int, places: dict[Root, int]) -> fx.Node | None:
        """An argument that a call may write its result over, in memory that nobody reads afterwards.

        An elementwise call may write over any argument, ``addmm`` and the like over the tensor that is added.
        """
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if len(results(node)) != 1 or not (pointwise or node.target in _ADDED_TO_FIRST):
            return None
        if any(root in self.parts for root in self.aliases.of(node)):
            return None
        (result,) = results(node)
        read = list(self.aliases.read(node))
        for value, root in read:
            whole = root in places and _bytes(results(root.node)[root.index]) == _bytes(result)
            views = {_layout(results(other)[0]) for other, of in read if of == root}
            allowed = pointwise or (value is node.args[0] and [of for _, of in read].count(root) == 1)
            if allowed and whole and self._last_use[root] == position and views == {_layout(result)}:
                return value
        return None


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


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()


def _bytes(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return (
        1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    ) * tensor.element_size()
