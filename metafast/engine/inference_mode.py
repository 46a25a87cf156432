"""Calls inside ``torch.inference_mode()``, in which trainers validate: gradients are taken inside nevertheless."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Replaces inference mode by ``torch.no_grad()``, which an inner loop can leave for a while."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def usable(batch: Any) -> Any:
    """A batch whose tensors autograd can keep: copies of those that were made in inference mode."""
    return pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, batch
    )
