"""Leaves out operations without effect."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch._ops import OpOverload

from metafast.program.aliases import written_arguments
from metafast.program.graph import CALL, INPUT, OUTPUT, Node

_aten = torch.ops.aten


def simplified(nodes: list[Node]) -> list[Node]:
    """The nodes without operations whose results nothing reads, and without copies that only change the order of a stack."""
    return _alive(_stacks_in_order(_alive(nodes)))


def _alive(nodes: list[Node]) -> list[Node]:
    """The nodes that have an effect, or that another one of these reads; and all inputs."""
    read: set[Node] = set()
    alive = []
    for node in reversed(nodes):
        if node in read or _has_effect(node):
            read.update(node.sources)
            alive.append(node)
    return alive[::-1]


def _has_effect(node: Node) -> bool:
    """Whether a node does something besides giving a value. Random numbers that nobody reads are drawn as well."""
    op = node.target
    if not isinstance(op, OpOverload):
        return node.kind in (INPUT, OUTPUT)
    return (
        op._schema.is_mutable
        or not op._schema.returns
        or torch.Tag.nondeterministic_seeded in op.tags
        or bool(written_arguments(node))
    )


def _stacks_in_order(nodes: list[Node]) -> list[Node]:
    """Makes contiguous copies of permuted stacks views of a stack of permuted tensors.

    The gradient of a query, key and value that one matrix made is such a copy, for example.
    """
    readers = Counter(source for node in nodes for source in node.sources)
    permuted: dict[Node, list[Node]] = {}
    for clone in nodes:
        if clone.target is not _aten.clone.default or not clone.value.is_contiguous:
            continue
        permute: Any = clone.args[0]
        if permute.target is not _aten.permute.default or readers[permute] != 1:
            continue
        stack: Any = permute.args[0]
        if stack.target is not _aten.stack.default or readers[stack] != 1:
            continue
        rank = len(stack.value.shape)
        order = [dim % rank for dim in permute.args[1]]
        dim = (stack.args[1] if len(stack.args) > 1 else 0) % rank
        kept = [other - (other > dim) for other in order if other != dim]
        permuted[stack] = [
            Node(CALL, _aten.permute.default, (tensor, kept), value=tensor.value.permuted(kept))
            for tensor in stack.args[0]
        ]
        stack.become(_aten.stack.default, (permuted[stack], order.index(dim)), {}, clone.value)
        clone.become(_aten.alias.default, (stack,), {}, clone.value)
    return [every for node in nodes for every in (*permuted.get(node, ()), node)]
