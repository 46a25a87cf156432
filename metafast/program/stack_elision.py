"""Stacks that need no copy, since their parts are made in their memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafast.program.aliases import Aliases, Root
from metafast.program.graph import OUTPUT, Node

_aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """The place in a stack of a value that is read nowhere else.

    Attributes:
        stack: the call of ``torch.stack``.
        index: position of the value in it.
        order: order of the value's dimensions there.
    """

    stack: Node
    index: int
    order: tuple[int, ...]

    def within(self, stacked: Tensor) -> Tensor:
        """The value's tensor, given that of the stack."""
        inverse = [self.order.index(dim) for dim in range(len(self.order))]
        return stacked.select(_dim(self.stack), self.index).permute(inverse)


def parts_of_stacks(nodes: Sequence[Node], running: set[Node], aliases: Aliases) -> dict[Root, Part]:
    """For each stack, the memory of its parts, where all of them can be made in the stack.

    A part is a whole result of a call, its dimensions in any order, that nothing but the stack reads. A call that gives a
    list is an update, which writes contiguous tensors alone.
    """
    readers: dict[Root, list[Node]] = {}
    for node in nodes:
        if node in running or node.kind == OUTPUT:
            for _, root in aliases.read(node):
                readers.setdefault(root, []).append(node)
    found: dict[Root, Part] = {}
    for stack in nodes:
        if stack not in running or stack.target is not _aten.stack.default:
            continue
        values: Any = stack.args[0]
        parts = {}
        for index, value in enumerate(values):
            base, order = _unpermuted(value)
            (root,) = aliases.of(base)
            if (
                root.node in running
                and root.node.target is not stack.target
                and (base is root.node or (base.target is operator.getitem and base.args[0] is root.node))
                and readers[root] == [stack]
                and root not in aliases.written
                and base.value.dtype == stack.value.dtype
                and not isinstance(root.node.value, list)
            ):
                parts[root] = Part(stack, index, order)
        if len(parts) == len(values):
            found.update(parts)
    return found


def _unpermuted(value: Any) -> tuple[Node, tuple[int, ...]]:
    """The value that ``value`` is a permutation of, and its dimension for each dimension of ``value``."""
    rank = len(value.value.shape)
    order = tuple(range(rank))
    while value.target in (_aten.permute.default, _aten.transpose.int):
        value, *dims = value.args
        if len(dims) == 1:
            (moved,) = dims
        else:
            moved = list(range(rank))
            moved[dims[0]], moved[dims[1]] = moved[dims[1]], moved[dims[0]]
        order = tuple(moved[at] % rank for at in order)
    return value, order


def _dim(stack: Any) -> int:
    dim = stack.args[1] if len(stack.args) > 1 else 0
    return int(dim % len(stack.value.shape))
