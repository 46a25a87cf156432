"""What autograd holds, counted by its hooks."""

from __future__ import annotations

import weakref

import torch


class _Saved:
    def __init__(self, tensor):
        self.tensor = tensor


def held_bytes(call):
    """The bytes of the tensors that the graph of ``call()`` holds while its results live, each storage once."""
    saved = weakref.WeakSet()

    def pack(tensor):
        kept = _Saved(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        results = call()
    storages = [kept.tensor.untyped_storage() for kept in saved]
    del results
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
