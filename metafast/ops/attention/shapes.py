"""Shapes that broadcast, as torch's own attention has it, brought to those that the kernels take."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def aligned(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``[*lead, Hq, Nq, D]``, ``[*lead, Hk, Nk, D]`` and ``[*lead, Hk, Nk, Dv]`` of checked tensors.

    Query head h reads key head ``h // (Hq // Hk)``. A copy is made only where key and value have different numbers of heads,
    and none has one.
    """
    ndim = max(3, query.ndim, key.ndim, value.ndim)
    query, key, value = (x if x.ndim == ndim else x[(None,) * (ndim - x.ndim)] for x in (query, key, value))
    heads, key_heads, value_heads = query.shape[-3], key.shape[-3], value.shape[-3]
    lead = query.shape[:-3]
    if key.shape[:-3] != lead or value.shape[:-3] != lead:
        lead = torch.broadcast_shapes(lead, key.shape[:-3], value.shape[:-3])
    if enable_gqa:
        shared = key_heads if key_heads == value_heads else math.lcm(key_heads, value_heads)
    else:
        # One head of keys and values beside many of queries is one group; one of queries beside many of keys is that many.
        none = 0 in (heads, key_heads, value_heads)
        shared = 0 if none else max(key_heads, value_heads)
        heads = 0 if none else max(heads, shared)
    return _of_heads(query, lead, heads), _of_heads(key, lead, shared), _of_heads(value, lead, shared)


def _of_heads(x: Tensor, lead: torch.Size, heads: int) -> Tensor:
    own = x.shape[-3]
    if own != heads and own > 1:
        x = x.repeat_interleave(heads // own, -3)
    shape = (*lead, heads, *x.shape[-2:])
    return x if x.shape == shape else x.expand(shape)
