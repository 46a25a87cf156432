"""Removes operations without effect from a recorded graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def simplify(graph: fx.Graph) -> None:
    """Removes operations whose results nothing reads, and copies that only change the order of a stack in memory."""
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target is _aten.clone.default:
            _stack_in_order(graph, node)
    graph.eliminate_dead_code()


def _stack_in_order(graph: fx.Graph, clone: fx.Node) -> None:
    """Replaces a contiguous copy of a permuted stack by a stack of permuted tensors.

    The gradient of a query, key and value that one matrix made is such a copy, for example.
    """
    permute: Any = clone.args[0]
    if not _is_only_step(permute, _aten.permute.default):
        return
    stack: Any = permute.args[0]
    if not _is_only_step(stack, _aten.stack.default) or not clone.meta["val"].is_contiguous():
        return
    rank = stack.meta["val"].ndim
    order = [dim % rank for dim in permute.args[1]]
    dim = (stack.args[1] if len(stack.args) > 1 else 0) % rank
    kept = [other - (other > dim) for other in order if other != dim]
    with graph.inserting_before(stack):
        permuted = []
        for tensor in stack.args[0]:
            permuted.append(graph.call_function(_aten.permute.default, (tensor, kept)))
            permuted[-1].meta["val"] = tensor.meta["val"].permute(kept)
        stacked = graph.call_function(_aten.stack.default, (permuted, order.index(dim)))
    stacked.meta["val"] = clone.meta["val"]
    clone.replace_all_uses_with(stacked)


def _is_only_step(node: object, target: object) -> bool:
    """Whether a value is made by that operation and read by one other."""
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1
