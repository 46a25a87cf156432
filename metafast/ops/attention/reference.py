"""Attention in plain PyTorch: what every fused path is compared with. Differentiable to any order, any dtype or device."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """softmax(scale Q Kᵀ + mask) V on dense matrices, O(Nq Nk) memory.

    Args:
        query: ``[*lead, Hq, Nq, D]``.
        key: ``[*lead, Hk, Nk, D]``, where ``Hq`` is a multiple of ``Hk``.
        value: ``[*lead, Hk, Nk, Dv]``.
        attn_mask: None, or boolean (True: may attend) or floating (added), broadcastable to ``[*lead, Hq, Nq, Nk]``.
        dropout_p: probability of dropping a weight.
        is_causal: row i attends to columns j ≤ i only, besides what ``attn_mask`` allows.
        scale: factor of the scores.

    Returns:
        ``[*lead, Hq, Nq, Dv]``; zeros for a row that may attend to nothing.
    """
    group = query.shape[-3] // key.shape[-3]
    if group > 1:
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scores = scale * (query @ key.transpose(-1, -2))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if is_causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~below, -torch.inf)
    # The softmax of a row of -inf is NaN, with NaN gradients; such a row is replaced before and zeroed after.
    attends = (scores != -torch.inf).any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~attends, 0.0), -1).masked_fill(~attends, 0.0)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, train=True)
    return weights @ value
