"""Tensors that require a gradient and are no parameters of the learner, found in the graph of its loss."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node

from metafast.engine.autograd_graph import nodes

References = list["weakref.ref[Tensor]"]


def find_untracked(ends: Iterable[Node | None], known: Iterable[Tensor]) -> References:
    """The leaves of the graph that ends in ``ends`` that are not among the ``known`` ones."""
    ours = {id(tensor) for tensor in known}
    leaves = (getattr(node, "variable", None) for node in nodes(ends))
    return [weakref.ref(leaf) for leaf in leaves if leaf is not None and id(leaf) not in ours]


class UntrackedLeafError(RuntimeError):
    """A leaf that is no parameter of the learner would get a wrong gradient."""


def refuse_untracked(found: References, option: str) -> None:
    """Raises UntrackedLeafError where an untracked leaf outlives the graph.

    ``option`` computes the gradients of the known tensors alone, so that the leaf's gradient would be wrong. A leaf that the
    loss made for itself no longer exists by then.
    """
    for reference in found:
        leaf = reference()
        if leaf is not None:
            raise UntrackedLeafError(
                f"{option}: model and loss_fn reach a tensor of shape {tuple(leaf.shape)} that requires a gradient and is "
                "no parameter that the learner was made with, so that its gradient would be wrong: make it one, switch it "
                f"off by requires_grad_(False), or do without {option}"
            )
