"""A function that keeps its inputs instead of its graph, and can be differentiated twice while it is rebuilt."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree

from metafast.engine.freed_memory import give_back
from metafast.engine.replay_state import ReplayState, written_parameters
from metafast.engine.untracked_leaves import find_untracked, refuse_untracked

# ``function(inputs, create_graph)``: pytrees of tensors in and out, with a graph or without.
Recomputable: TypeAlias = Callable[[Any, bool], Any]


def recomputed(function: Recomputable, inputs: Any, model: nn.Module, *, is_large: bool = False) -> Any:
    """``function(inputs)``, whose graph is built in the backward pass, used once and freed.

    Args:
        function: may depend on the random state, the backend, autocast and the buffers of ``model``; no tensor that
            needs a gradient reaches it but through ``inputs``.
        inputs: pytree of tensors.
        model: whose buffers ``function`` reads and updates.
        is_large: whether the graph consists of large tensors; then freed memory goes back to the system before it is
            differentiated, which takes the most memory.

    Raises:
        RuntimeError: in the backward pass, where such a tensor reached it.
    """
    tensors, structure = pytree.tree_flatten(inputs)
    call = _Call(function, structure, model, is_large)
    outputs = _Recomputed.apply(call, *tensors)
    assert call.outputs is not None
    return pytree.tree_unflatten(list(outputs), call.outputs)


class _Here(threading.local):
    rebuilding: bool = False


_here = _Here()


def is_rebuilding() -> bool:
    """Whether a function runs again for the sake of its graph alone: its results are not read."""
    return _here.rebuilding


@contextlib.contextmanager
def _rebuilding() -> Iterator[None]:
    before, _here.rebuilding = _here.rebuilding, True
    try:
        yield
    finally:
        _here.rebuilding = before


class _Call:
    def __init__(self, function: Recomputable, structure: pytree.TreeSpec, model: nn.Module, is_large: bool) -> None:
        self.function = function
        self.structure = structure
        self.model = model
        self.is_large = is_large
        self.outputs: pytree.TreeSpec | None = None

    def run(self, tensors: list[Tensor], create_graph: bool) -> list[Tensor]:
        inputs = pytree.tree_unflatten(tensors, self.structure)
        outputs, self.outputs = pytree.tree_flatten(self.function(inputs, create_graph))
        return outputs


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.replay_state = ReplayState(tensors[0].device, call.model)
        # A rebuilt step reads what the forward read, not what its look-ups, and those of other steps, have written since.
        writes = bool(written_parameters(call.model))
        ctx.save_for_backward(*(tensor.detach().clone() if writes else tensor for tensor in tensors))
        outputs = tuple(output.detach() for output in call.run(list(tensors), create_graph=False))
        ctx.replay_state.forget_unchanged()
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        inputs = [t.detach().requires_grad_(want) for t, want in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad(), ctx.replay_state.replayed(), _rebuilding():
            outputs = ctx.call.run(inputs, create_graph=True)
        reached = [c for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        edges = [torch.autograd.graph.get_gradient_edge(o) for o in outputs if o.requires_grad]
        del outputs
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        found = find_untracked([edge.node for edge in edges], leaves)
        if ctx.call.is_large:
            give_back()
        grads = iter(torch.autograd.grad(edges, leaves, reached, allow_unused=True) if edges else [None] * len(leaves))
        del edges, reached
        refuse_untracked(found, "checkpoint=True")
        return (None, *(next(grads) if want else None for want in wanted))
