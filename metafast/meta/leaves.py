"""What a graph ends in."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

Strangers = list["weakref.ref[Tensor]"]


def strangers(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> Strangers:
    """The tensors besides the ``known`` ones that the graph of ``outputs`` ends in."""
    ours = {id(tensor) for tensor in known}
    found = []
    waiting = [output.grad_fn for output in outputs]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ours:
            found.append(weakref.ref(leaf))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def refuse(found: Strangers, option: str) -> None:
    """Raises RuntimeError where one of ``strangers`` outlives the graph, so that ``option``, which computes the gradients of
    the known tensors alone, would give it a wrong one without a word. What a loss makes for itself is gone by then."""
    for reference in found:
        leaf = reference()
        if leaf is not None:
            raise RuntimeError(
                f"{option}: model and loss_fn reach a tensor of shape {tuple(leaf.shape)} that requires a gradient and is "
                "no parameter that the learner was made with, so that its gradient would be wrong: make it one, switch it "
                f"off by requires_grad_(False), or do without {option}"
            )
