"""A graph of autograd: its nodes, and the memory that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree


def graph_bytes(results: Iterable[Tensor], known: Iterable[Tensor]) -> int:
    """The bytes of the tensors that the graph of ``results`` keeps, each storage once, without those of ``known``."""
    storages = {}
    for node in nodes(tensor.grad_fn for tensor in results):
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    for tensor in known:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values())


def nodes(ends: Iterable[Node | None]) -> Iterator[Node]:
    """The nodes from which the results of ``ends`` were computed, and these, each once."""
    waiting = [node for node in ends if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


# Of each type of node, the names of what it saves.
_names: dict[type, tuple[str, ...]] = {}


def _saved(node: Node) -> Iterator[Tensor]:
    kind = type(node)
    if kind not in _names:
        # Raw: unpacking would compute again what the model checkpoints.
        _names[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    for name in _names[kind]:
        value: Any = getattr(node, name)
        for saved in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(saved.data, Tensor):
                yield saved.data
    # A Function may also keep tensors as attributes.
    for value in vars(node).values() if hasattr(node, "__dict__") else ():
        yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
