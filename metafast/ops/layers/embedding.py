"""Looking rows up in a table where torch's batching rule gets the derivative wrong; formulas in README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast.ops.torch_internals import are_transforms_active

_torch_embedding = torch.embedding
_torch_embedding_bag = torch.embedding_bag


def embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """``torch.embedding``, for tables of several tasks under ``torch.func.vmap``.

    Args:
        weight: ``[V, D]``, floating.
        indices: ``[*]``, integers.
        padding_idx: the row that is taken for a constant; -1: none.
        scale_grad_by_freq: divide the gradient of a row by how often the row is read in this call.
        sparse: give a sparse gradient. A table that is computed from others, or that a transform holds, gets a dense one:
            what comes before it could not take a sparse one.

    Returns:
        ``[*, D]``.
    """
    if not are_transforms_active():
        return _torch_embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse and weight.is_leaf)
    if scale_grad_by_freq:
        # A table that all tasks share is read by all of them in one call of torch's: as a table of each task's own, each
        # task counts for itself.
        weight = weight + (0 * indices.sum()).to(weight.dtype)
    rows = _torch_embedding(weight, indices, -1, scale_grad_by_freq, False)
    if padding_idx < 0:
        return rows
    return torch.where((indices == padding_idx).unsqueeze(-1), rows.detach(), rows)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    *others: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.embedding_bag``, with a dense gradient for a table that is computed from others, or that a transform holds.

    Args:
        weight: ``[V, D]``, floating.
        indices, offsets, scale_grad_by_freq, mode, others, options: as torch takes them.
        sparse: give a sparse gradient to a table that is a leaf.
    """
    sparse = sparse and weight.is_leaf and not are_transforms_active()
    return _torch_embedding_bag(weight, indices, offsets, scale_grad_by_freq, mode, sparse, *others, **options)
