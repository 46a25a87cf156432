"""Planning a program: which operations of a recording run at each call, and where their results lie in memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from metafast.ops.layers import library as _library  # noqa: F401 - defines an op that is named below
from metafast.program.aliases import Aliases, Root, aliased_argument, written_arguments
from metafast.program.arena import Arena
from metafast.program.graph import CALL, OUTPUT, Form, Node, leaves
from metafast.program.recording import draws_random_numbers
from metafast.program.stack_elision import Part, parts_of_stacks


class Plan:
    """The plan of a program: for each node of a recording, whether and when it runs and where its result lies.

    Attributes:
        nodes: the nodes, in order.
        aliases: the memory that each node reads and writes.
        running: nodes that are called at each replay. The others are views of memory that is known beforehand, or constants.
        constant: memory whose contents depend on nothing, and are computed once.
        parts: for memory that is part of a stack, its place in the stack.
        stacks: nodes that need no call, since their parts are made in their memory.
        overwritten: for calls that write their result over an argument, this argument.
        places: offsets of the results of calls, in one block of memory.
        bytes: size of that block.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.aliases = Aliases(nodes)
        self.constant: set[Root] = set()
        self.running = {node for node in self.nodes if self._runs(node)}
        self.parts: dict[Root, Part] = parts_of_stacks(self.nodes, self.running, self.aliases)
        self.stacks = {part.stack for part in self.parts.values()}
        self.running -= self.stacks
        self._last_use = self._last_uses()
        self.overwritten: dict[Node, Node] = {}
        self.places, self.bytes = self._placed()

    def _runs(self, node: Node) -> bool:
        """Whether a node is called at each replay. To be asked in their order: constants depend on constants."""
        if node.kind != CALL or node.target is operator.getitem:
            return False
        if written_arguments(node):
            return True
        return aliased_argument(node) is None and not self._is_constant(node)

    def _is_constant(self, node: Node) -> bool:
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
            if node.kind == OUTPUT or node in self.running:
                for _, root in self.aliases.read(node):
                    last[root] = position
                if node.kind != OUTPUT:
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
                for root, result in zip(self.aliases.of(node), leaves(Form, node.value), strict=True):
                    if root in self.parts:
                        stack = self.parts[root].stack
                        (root,) = self.aliases.of(stack)
                        (result,) = leaves(Form, stack.value)
                        if root in places:
                            continue
                    sizes[root] = result.bytes
                    if over is None:
                        places[root] = arena.take(sizes[root])
                    else:
                        self.overwritten[node] = over
                        (taken,) = self.aliases.of(over)
                        places[root], sizes[taken] = places[taken], 0
            for root in ending.get(position, ()) if node.kind != OUTPUT else ():
                if root in places and sizes[root]:
                    arena.give_back(places[root], sizes[root])
        return places, arena.size

    def _overwritable(self, node: Node, position: int, places: dict[Root, int]) -> Node | None:
        """An argument that a call may write its result over, in memory that nobody reads afterwards.

        An elementwise call may write over any argument, ``addmm`` and the like over the tensor that is added.
        """
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not (pointwise or node.target in _ADDED_TO_FIRST):
            return None
        given = list(leaves(Form, node.value))
        if len(given) != 1 or any(root in self.parts for root in self.aliases.of(node)):
            return None
        (result,) = given
        read = list(self.aliases.read(node))
        for value, root in read:
            if root not in places or self._last_use[root] != position:
                continue
            whole = list(leaves(Form, root.node.value))[root.index].bytes == result.bytes
            views = {next(leaves(Form, other.value)) for other, of in read if of == root}
            allowed = pointwise or (value is node.args[0] and [of for _, of in read].count(root) == 1)
            if allowed and whole and views == {result}:
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
