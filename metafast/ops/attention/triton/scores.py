# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""What a pass makes of a tile of scores: the scores themselves, their weights, what dropout drops, and tangents.

A tile is ``[QUERY_BLOCK, KEY_BLOCK]``; in a kernel over blocks of keys (``BY_KEYS``) it is the transpose of that, so that
the left operands of the products that follow are there as they are.

Scores are in base 2, S · log2(e), which is what the hardware's exponential takes; so are the saved row statistics, which
only these kernels read. Masks and all tangents are in natural units.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from metafast.ops.attention.triton.common import statistic_of

LOG2E = tl.constexpr(1.4426950408889634)
# Finite numbers of an additive mask below this would be -inf in base 2 and forbid, where the caller only added something.
LOWEST = tl.constexpr(-2.3e38)


class Tile(NamedTuple):
    """Where a tile of scores lies: the head, the first query and key, how many of each there are in all, the first and the
    end of the keys that exist (``existing_keys``), rows and columns of the tile (``rows_and_columns``), and the start of the
    masks of the batch (``mask_of``)."""

    head: Any
    first_query: Any
    first_key: Any
    n_queries: Any
    n_keys: Any
    key_begin: Any
    key_end: Any
    rows: Any
    columns: Any
    mask: Any


@triton.jit
def mask_of(mask, batch):
    """Pointer to the masks of a batch's heads; without a mask a zero that nothing reads."""
    if mask.pointer is None:
        return 0
    else:  # noqa: RET505 - Triton would compile what follows a return too
        batch = tl.cast(batch, tl.int64)
        if mask.batches is not None:
            batch = tl.load(mask.batches + batch)
        return mask.pointer + batch * mask.batch


@triton.constexpr_function
def is_additive(pointer):
    """Whether there is a mask that is added; a boolean one comes as bytes."""
    return pointer is not None and pointer.dtype.element_ty != tl.uint8


@triton.jit
def seed_of(settings, batch):
    """The seed of a batch; without dropout a zero that nothing reads."""
    if settings.dropout_seeds is None:
        return 0
    else:  # noqa: RET505 - Triton would compile what follows a return too
        return tl.load(settings.dropout_seeds + batch)


@triton.jit
def load_softmax(statistics, query, mask, batch, head, heads, first, n_queries, ROWS: tl.constexpr):
    """What to subtract from the rows' scores before exp2, in two steps: their maximum, log2 of the sum of exp2(score - it).

    The first is +inf for rows that may attend to nothing and outside, so that their weights are zero. A half type does
    not need two steps unless a mask is added; the first is then the whole, which saves registers, and the second a constant.
    """
    pointers, inside = statistic_of(statistics, batch, head, heads, first, n_queries, ROWS, 2)
    pairs = tl.load(pointers[:, None] + tl.arange(0, 2)[None, :], mask=inside[:, None], other=float("inf"))
    largest, log_total = tl.split(pairs)
    if is_additive(mask.pointer) or query.pointer.dtype.element_ty == tl.float32:
        return largest, log_total
    else:  # noqa: RET505 - Triton would compile what follows a return too
        return largest + log_total, tl.zeros([ROWS], dtype=tl.float32)


@triton.jit
def store_softmax(statistics, batch, head, heads, first, n_queries, largest, log_total, ROWS: tl.constexpr):
    """Writes what ``load_softmax`` reads.

    Two numbers, not their sum: that is rounded as coarsely as the largest score is large, and the weights of a row then sum
    to something else than 1; next to the lowest number that a mask can add, the second would be rounded away.
    """
    pointers, inside = statistic_of(statistics, batch, head, heads, first, n_queries, ROWS, 2)
    tl.store(pointers, largest, mask=inside)
    tl.store(pointers + 1, log_total, mask=inside)


@triton.jit
def by_query(numbers, BY_KEYS: tl.constexpr):
    """One number a query, along a tile's dimension of queries."""
    return tl.expand_dims(numbers, 0 if BY_KEYS else 1)


@triton.jit
def rows_and_columns(QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, BY_KEYS: tl.constexpr):
    """The queries of a tile, counted from its first, and the keys: each along its dimension, for ``Tile``."""
    return by_query(tl.arange(0, QUERY_BLOCK), BY_KEYS), by_query(tl.arange(0, KEY_BLOCK), not BY_KEYS)


@triton.jit
def product(of_queries, of_keys, total, BY_KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """``of_queries`` · ``of_keys``ᵀ, as a tile, added to the tile ``total`` if that is not None."""
    if BY_KEYS:
        return tl.dot(of_keys, tl.trans(of_queries), total, input_precision=PRECISION)
    else:  # noqa: RET505 - Triton would compile what follows a return too
        return tl.dot(of_queries, tl.trans(of_keys), total, input_precision=PRECISION)


@triton.jit
def load_mask(mask, mask_start, tile):
    """A tile of a mask whose batch begins at ``mask_start``, zero outside; of one row where the mask has one."""
    start = mask_start + tl.cast(tile.head, tl.int64) * mask.head + tl.cast(tile.first_key, tl.int64) * mask.column
    offsets = tile.columns * mask.column
    # Not up to the last key that exists: numbers from memory may be odd, and the entries would be loaded one by one.
    inside = tile.columns < tile.n_keys - tile.first_key
    if mask.row is not None:
        start += tl.cast(tile.first_query, tl.int64) * mask.row
        offsets += tile.rows * mask.row
        inside = inside & (tile.rows < tile.n_queries - tile.first_query)
    return tl.load(start + offsets, mask=inside, other=0)


@triton.jit
def scores(query, key, mask, settings, tile, BY_KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of a tile in base 2, with the additive mask added and -inf where the row may not attend to the key."""
    s = product(query, key, None, BY_KEYS, PRECISION) * (settings.scale * LOG2E)
    allowed = tile.columns < tile.key_end - tile.first_key
    if settings.key_ranges is not None:
        allowed = allowed & (tile.columns >= tile.key_begin - tile.first_key)
    if mask.pointer is not None:
        values = load_mask(mask, tile.mask, tile)
        if is_additive(mask.pointer):
            bias = values.to(tl.float32)
            s += tl.where((bias < LOWEST) & (bias > float("-inf")), LOWEST, bias) * LOG2E
        else:
            allowed = allowed & (values != 0)
    if settings.left is not None:
        allowed = allowed & (tile.columns + tile.first_key >= tile.rows + (tile.first_query - settings.left))
    if settings.end is not None:
        allowed = allowed & (tile.columns + tile.first_key < tile.rows + (tile.first_query + settings.end))
    return tl.where(allowed, s, float("-inf"))


@triton.jit
def weights(query, key, largest, log_total, mask, settings, tile, BY_KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """P, the softmax of a tile's scores, from what ``load_softmax`` has loaded for its queries."""
    s = scores(query, key, mask, settings, tile, BY_KEYS, PRECISION)
    return tl.exp2(s - by_query(largest, BY_KEYS) - by_query(log_total, BY_KEYS))


@triton.jit
def tangent_scores(
    query, key, tangent_query, tangent_key, subtrahend, scale, BY_KEYS: tl.constexpr, PRECISION: tl.constexpr
):
    """Ṡ less ``subtrahend``, one number a query, and without what ``add_tangent_mask`` adds."""
    t = product(tangent_query, key, None, BY_KEYS, PRECISION)
    return product(query, tangent_key, t, BY_KEYS, PRECISION) * scale - by_query(subtrahend, BY_KEYS)


@triton.jit
def add_tangent_mask(t, tangent_mask, mask_start, tile):
    """``t`` of a tile and the tangent of the additive mask, if there is one."""
    if tangent_mask.pointer is None:
        return t
    else:  # noqa: RET505 - Triton would compile what follows a return too
        return t + load_mask(tangent_mask, mask_start, tile).to(tl.float32)


@triton.jit
def dropout_factors(settings, seed, tile, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, BY_KEYS: tl.constexpr):
    """What dropout multiplies the weights of a tile by: its factor or zero. Without dropout a zero that nothing reads.

    The word of (head, row, column) is number column % 4 of Philox-4x32-10 at the counter (column // 4, row, head, 0) under
    the batch's seed: whatever tile it is in, and in the reference. A counter serves four columns; tiles start at
    multiples of 16.
    """
    if settings.dropout_seeds is None:
        return 0.0
    else:  # noqa: RET505 - Triton would compile what follows a return too
        quads = tile.first_key // 4 + tl.arange(0, KEY_BLOCK // 4)[None, :]
        rows = tile.first_query + tl.arange(0, QUERY_BLOCK)[:, None]
        words = tl.philox(seed, quads, rows, tile.head, 0)
        threshold = tl.cast(settings.dropout_threshold, tl.uint32)
        # Joined as bytes: the tile then changes its layout at a quarter of the cost.
        first, second = (words[0] >= threshold).to(tl.int8), (words[1] >= threshold).to(tl.int8)
        third, fourth = (words[2] >= threshold).to(tl.int8), (words[3] >= threshold).to(tl.int8)
        keep = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [QUERY_BLOCK, KEY_BLOCK])
        factors = tl.where(keep != 0, settings.dropout_factor, 0.0)
        if BY_KEYS:
            factors = tl.trans(factors)
        return factors


@triton.jit
def dropped(values, factors, settings):
    """``values`` of a tile times what ``dropout_factors`` returns; the values themselves without dropout."""
    if settings.dropout_seeds is None:
        return values
    else:  # noqa: RET505 - Triton would compile what follows a return too
        return values * factors
