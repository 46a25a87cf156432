"""Calls of modules whose parameters are tensors with a graph: accelerated, and recomputed as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from metafast.acceleration import Names, accelerated_thread
from metafast.engine.recompute_in_model import follow, recomputed_with

__all__ = ["called", "follow"]


@contextlib.contextmanager
def called(module: nn.Module, names: Names) -> Iterator[None]:
    """Runs ``module`` inside :func:`metafast.accelerate`; checkpointed parts are recomputed inside it too."""
    with accelerated_thread(names), recomputed_with(module, None, names):
        yield
