"""Values of a recording that share memory, and memory that is written to more than once."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from metafast.program.graph import CALL, INPUT, TENSOR, Form, Node, leaves, mapped


@dataclass(frozen=True, slots=True)
class Root:
    """The memory of an operation's ``index``-th result, or of an input or a tensor that was reached otherwise."""

    node: Node
    index: int


class Aliases:
    """The memory behind every value of a recording.

    Attributes:
        written: memory that some operation changes in place.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        # As a node's value is made up: one, or lists of them; None for what is no tensor, such as a gradient not asked for.
        self._roots: dict[Node, Any] = {}
        self._flat: dict[Node, tuple[Root, ...]] = {}
        self.written: set[Root] = set()
        for node in nodes:
            if node.kind in (INPUT, TENSOR):
                self._roots[node] = Root(node, 0)
            elif node.kind == CALL:
                self._roots[node] = self._of_call(node)
            else:
                continue
            self._flat[node] = tuple(leaves(Root, self._roots[node]))

    def of(self, node: Node) -> tuple[Root, ...]:
        """The root of each tensor that the node gives."""
        return self._flat[node]

    def read(self, node: Node) -> Iterator[tuple[Node, Root]]:
        """The values that a node takes, and their memory."""
        for value in node.sources:
            for root in self.of(value):
                yield value, root

    def meets_writes(self, node: Node) -> bool:
        """Whether anything that the node takes or gives is changed in place at some time."""
        return bool(self.written) and any(
            root in self.written for value in (node, *node.sources) for root in self.of(value)
        )

    def _of_call(self, node: Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return self._roots[source][index]
        for source in written_arguments(node):
            self.written.update(self.of(source))
        base = aliased_argument(node)
        if base is not None:
            return mapped(Form, lambda _: self._roots[base], node.value)
        count = itertools.count()
        return mapped(Form, lambda _: Root(node, next(count)), node.value)


def written_arguments(node: Node) -> list[Node]:
    """The memory that a call changes in place."""
    if not isinstance(node.target, OpOverload) or reshapes_in_place(node):
        return []
    return [value for place in _written(node.target) for value in _given(node, place)]


def reshapes_in_place(node: Node) -> bool:
    """Whether a call leaves its argument's memory alone and makes the argument itself another view of it."""
    return getattr(node.target, "overloadpacket", None) in _RESHAPING


def aliased_argument(node: Node) -> Node | None:
    """The argument that a call returns, or returns views of."""
    if not isinstance(node.target, OpOverload):
        return None
    return next((value for place in _returned(node.target) for value in _given(node, place)), None)


_aten = torch.ops.aten
_RESHAPING = {_aten.squeeze_, _aten.unsqueeze_, _aten.t_, _aten.transpose_, _aten.detach_}
_STATISTICS = ("running_mean", "running_var")
# What the schema of an operation does not say that it writes.
_WRITTEN_UNSAID: dict[Any, tuple[str, ...]] = {
    torch.ops.aten.native_batch_norm.default: _STATISTICS,
    torch.ops.aten.cudnn_batch_norm.default: _STATISTICS,
    torch.ops.aten.miopen_batch_norm.default: _STATISTICS,
    torch.ops.aten.batch_norm_update_stats.default: _STATISTICS,
}

# An argument of an operation: its position and its name.
_Place = tuple[int, str]


@functools.cache
def _written(op: OpOverload) -> list[_Place]:
    """The arguments that an operation changes."""
    return [
        (position, argument.name)
        for position, argument in enumerate(op._schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or argument.name in _WRITTEN_UNSAID.get(op, ())
    ]


@functools.cache
def _returned(op: OpOverload) -> list[_Place]:
    """The arguments that an operation returns, or returns views of."""
    if op is _aten._unsafe_view.default:
        # It says that nobody else holds its input; they share memory all the same.
        return [(0, "self")]
    # What a view returns a list of says nothing of aliases itself.
    returned = {name for value in op._schema.returns if value.alias_info for name in value.alias_info.before_set}
    return [
        (position, argument.name)
        for position, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and (op.is_view or returned & set(argument.alias_info.before_set))
    ]


def _given(node: Node, place: _Place) -> Iterator[Node]:
    """The nodes in an argument."""
    position, name = place
    return leaves(Node, node.args[position] if position < len(node.args) else node.kwargs.get(name))
