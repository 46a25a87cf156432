"""What a graph ends in."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def check_leaves(outputs: Iterable[Tensor], known: Iterable[Tensor], option: str) -> None:
    """Raises RuntimeError where the graph of ``outputs`` ends in a tensor besides the ``known`` ones: ``option`` computes
    gradients of these alone, and the other's would be wrong without a word."""
    ours = {id(tensor) for tensor in known}
    waiting = [output.grad_fn for output in outputs]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ours:
            raise RuntimeError(
                f"{option}: model and loss_fn reach a tensor of shape {tuple(leaf.shape)} that requires a gradient and is "
                "no parameter that the learner was made with, so that its gradient would be wrong: make it one, switch it "
                f"off by requires_grad_(False), or do without {option}"
            )
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
