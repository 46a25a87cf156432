"""Attention in plain PyTorch: what every fused path is compared with. Differentiable to any order, any dtype or device."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast.ops.attention.options import NO_LIMIT, Options

# Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seeds: Tensor | None,
    key_ranges: Tensor | None,
    options: Options,
) -> Tensor:
    """dropout(softmax(scale Q Kᵀ + mask)) V on dense matrices, O(Nq Nk) memory.

    Args:
        query: ``[*lead, Hq, Nq, D]``.
        key: ``[*lead, Hk, Nk, D]``, where ``Hq`` is a multiple of ``Hk``.
        value: ``[*lead, Hk, Nk, Dv]``.
        attn_mask: None, or boolean (True: may attend) or floating (added), broadcastable to ``[*lead, Hq, Nq, Nk]``.
        seeds: of the dropout, int64 ``[*lead]``; see :func:`keep_mask`. None without dropout.
        key_ranges: int64 ``[*lead, 2]``: the first key that exists, and the one after the last. None where all exist.
        options: the numbers, see :class:`Options`.

    Returns:
        ``[*lead, Hq, Nq, Dv]``; zeros for a row that may attend to nothing.
    """
    heads, rows, columns = *query.shape[-3:-1], key.shape[-2]
    group = heads // key.shape[-3]
    if group > 1:
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scores = options.scale * (query @ key.transpose(-1, -2))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if options.left != NO_LIMIT or options.right != NO_LIMIT:
        allowed = window(rows, columns, options.left, options.right, scores.device)
        scores = scores.masked_fill(~allowed, -torch.inf)
    if key_ranges is not None:
        column = torch.arange(columns, device=scores.device)
        begin, end = key_ranges[..., None, None, :1], key_ranges[..., None, None, 1:]
        scores = scores.masked_fill((column < begin) | (column >= end), -torch.inf)
    # The softmax of a row of -inf is NaN, with NaN gradients; such a row is replaced before and zeroed after.
    attends = (scores != -torch.inf).any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~attends, 0.0), -1).masked_fill(~attends, 0.0)
    if seeds is not None:
        keep = keep_mask(seeds, heads, rows, columns, options.dropout_p)
        weights = (weights / (1.0 - options.dropout_p)).masked_fill(~keep, 0.0)
    return weights @ value


def window(rows: int, columns: int, left: int, right: int, device: torch.device | None = None) -> Tensor:
    """Which columns a row may attend to, bool ``[rows, columns]``: i − left ≤ j ≤ i + right."""
    distance = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None]
    return (distance >= -left) & (distance <= right)


def keep_mask(seeds: Tensor, heads: int, rows: int, columns: int, dropout_p: float) -> Tensor:
    """Which attention weights dropout keeps, bool ``[*seeds.shape, heads, rows, columns]``.

    The weight of (head, row, column) is kept where word ``column % 4`` of Philox at the counter (column // 4, row, head, 0)
    under the key that the seed is, low word first, is at least ``dropout_p`` 2³². It depends on nothing else, so that all
    passes of all backends drop the same weights without storing which.
    """

    def positions(size: int, dims: int) -> Tensor:
        return torch.arange(size, device=seeds.device).view(size, *(1,) * dims)

    column = positions(columns, 0)
    seed = seeds[..., None, None, None]
    words = _philox((column >> 2, positions(rows, 1), positions(heads, 2), 0), (seed & _WORD, (seed >> 32) & _WORD))
    word = torch.stack(torch.broadcast_tensors(*words), -1)
    drawn = word.gather(-1, (column & 3).expand(word.shape[:-1])[..., None])[..., 0]
    return drawn >= dropout_threshold(dropout_p)


def dropout_threshold(dropout_p: float) -> int:
    """The smallest 32-bit word that is kept."""
    return min(round(dropout_p * 2**32), _WORD)


def _philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four 32-bit words at a counter of four under a key of two, all in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two words fills 64 bits: as int64 it wraps, and keeps its bits.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> 32) & _WORD ^ c1 ^ k0,
            second & _WORD,
            (first >> 32) & _WORD ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3  # type: ignore[return-value]
