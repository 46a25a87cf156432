"""Values of a graph that share memory, and memory that is written to more than once."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Root:
    """The memory of an operation's ``index``-th result, or of an input or attribute."""

    node: fx.Node
    index: int


class Aliases:
    """The memory behind every value of a graph.

    Attributes:
        written: memory that some operation changes in place.
    """

    def __init__(self, graph: fx.Graph) -> None:
        # As a node's value is made up: one, or lists of them; None for what is no tensor, such as a gradient not asked for.
        self._roots: dict[fx.Node, Any] = {}
        self.written: set[Root] = set()
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._roots[node] = Root(node, 0)
            elif node.op == "call_function":
                self._roots[node] = self._of_call(node)

    def of(self, node: fx.Node) -> tuple[Root, ...]:
        """The root of each tensor that the node gives."""
        return tuple(leaf for leaf in pytree.tree_leaves(self._roots[node]) if leaf is not None)

    def read(self, node: fx.Node) -> Iterator[tuple[fx.Node, Root]]:
        """The values that a node takes, and their memory."""
        for value in node.all_input_nodes:
            for root in self.of(value):
                yield value, root

    def meets_writes(self, node: fx.Node) -> bool:
        """Whether anything that the node takes or gives is changed in place at some time."""
        return bool(self.written) and any(
            root in self.written for value in (node, *node.all_input_nodes) for root in self.of(value)
        )

    def _of_call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return self._roots[source][index]  # type: ignore[index]
        for source in written_arguments(node):
            self.written.update(self.of(source))
        base = aliased_argument(node)
        if base is not None:
            return pytree.tree_map(lambda _: self._roots[base], node.meta.get("val"))
        count = itertools.count()
        return pytree.tree_map(
            lambda leaf: Root(node, next(count)) if isinstance(leaf, Tensor) else None, node.meta.get("val")
        )


def results(node: fx.Node) -> list[Tensor]:
    """The tensors, without data, that a call gives."""
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The memory that a call changes in place."""
    if reshapes_in_place(node):
        return []
    return [
        value
        for argument, value in _arguments(node)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or argument.name in _WRITTEN_UNSAID.get(node.target, ())
    ]


def reshapes_in_place(node: fx.Node) -> bool:
    """Whether a call leaves its argument's memory alone and makes the argument itself another view of it."""
    return getattr(node.target, "overloadpacket", None) in _RESHAPING


_aten = torch.ops.aten
_RESHAPING = {_aten.squeeze_, _aten.unsqueeze_, _aten.t_, _aten.transpose_, _aten.detach_}


def aliased_argument(node: fx.Node) -> fx.Node | None:
    """The argument that a call returns, or returns views of."""
    if node.target is torch.ops.aten._unsafe_view.default:
        # It says that nobody else holds its input; they share memory all the same.
        return node.args[0]  # type: ignore[return-value]
    if not isinstance(node.target, OpOverload):
        return None
    returns = node.target._schema.returns
    # What a view returns a list of says nothing of aliases itself.
    returned = {name for value in returns if value.alias_info for name in value.alias_info.before_set}
    for argument, value in _arguments(node):
        if argument.alias_info is not None and (node.target.is_view or returned & set(argument.alias_info.before_set)):
            return value
    return None


_STATISTICS = ("running_mean", "running_var")
# What the schema of an operation does not say that it writes.
_WRITTEN_UNSAID: dict[Any, tuple[str, ...]] = {
    torch.ops.aten.native_batch_norm.default: _STATISTICS,
    torch.ops.aten.cudnn_batch_norm.default: _STATISTICS,
    torch.ops.aten.miopen_batch_norm.default: _STATISTICS,
    torch.ops.aten.batch_norm_update_stats.default: _STATISTICS,
}


def _arguments(node: fx.Node) -> Iterator[tuple[Any, fx.Node]]:
    """The schema of every argument, with each value in it."""
    if not isinstance(node.target, OpOverload):
        return
    for position, argument in enumerate(node.target._schema.arguments):
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for value in pytree.tree_leaves(given):
            if isinstance(value, fx.Node):
                yield argument, value
