# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""What the attention kernels share: how they find their tile, read and write it, and mask scores.

Inside the kernels scores are in base 2, S · log2(e), which is what the hardware's exponential takes; what they exchange
(log-sum-exp, masks) is in natural units.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# An additive mask at or below this forbids the key as -inf does. Without it a row of nothing but finfo.min would keep a
# log-sum-exp in which the number of keys is rounded away, and its gradients would be wrong by that factor.
FORBIDDEN = tl.constexpr(-1e30)


class Matrix(NamedTuple):
    """A ``[batch, head, row, column]`` tensor: its data and its strides in elements; columns are contiguous."""

    pointer: Any
    batch: Any
    head: Any
    row: Any


class Mask(NamedTuple):
    """An attention mask: its data, the batch of it that each batch reads (None: the same number), its strides.

    A stride is 0 where the mask is broadcast; ``row`` is None there, so that one row is read and not many equal ones.
    """

    pointer: Any
    batches: Any
    batch: Any
    head: Any
    row: Any
    column: Any


@triton.jit
def locate(n_blocks, heads):
    """Block, batch and head of this program."""
    program = tl.program_id(0)
    matrix = program // n_blocks
    return program % n_blocks, matrix // heads, matrix % heads


@triton.jit
def mask_of(mask, batch, MASK: tl.constexpr):
    """Pointer to the masks of a batch's heads; without a mask a zero that nothing reads."""
    if MASK == "none":
        return 0
    else:  # noqa: RET505 - Triton would compile what follows a return too
        batch = tl.cast(batch, tl.int64)
        if mask.batches is not None:
            batch = tl.load(mask.batches + batch)
        return mask.pointer + batch * mask.batch


@triton.jit
def tile_of(matrix, batch, head, first, n_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to rows first … first + ROWS of one head's matrix, and which of them lie in its n_rows × WIDTH.

    Only the start of the tile needs 64 bits.
    """
    start = matrix.pointer + tl.cast(batch, tl.int64) * matrix.batch + tl.cast(head, tl.int64) * matrix.head
    start += tl.cast(first, tl.int64) * matrix.row
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = rows < n_rows - first
    if WIDTH < COLUMNS:
        inside = inside & (columns < WIDTH)
    return start + rows * matrix.row + columns, inside


@triton.jit
def load_tile(matrix, batch, head, first, n_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows first … first + ROWS of one head's matrix, zero outside it."""
    pointers, inside = tile_of(matrix, batch, head, first, n_rows, ROWS, WIDTH, COLUMNS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(
    matrix, batch, head, first, n_rows, values, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes what lies inside the matrix, rounded to its dtype."""
    pointers, inside = tile_of(matrix, batch, head, first, n_rows, ROWS, WIDTH, COLUMNS)
    tl.store(pointers, values.to(matrix.pointer.dtype.element_ty), mask=inside)


@triton.jit
def statistic_of(pointer, batch, head, heads, first, n_queries, ROWS: tl.constexpr):
    """Pointers to one number a row in a contiguous [batch, head, row], and which of them lie inside."""
    rows = tl.arange(0, ROWS)
    start = pointer + (tl.cast(batch * heads + head, tl.int64) * n_queries + first)
    return start + rows, rows < n_queries - first


@triton.jit
def load_statistic(pointer, batch, head, heads, first, n_queries, ROWS: tl.constexpr):
    """One number a row, zero outside."""
    pointers, inside = statistic_of(pointer, batch, head, heads, first, n_queries, ROWS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_statistic(pointer, batch, head, heads, first, n_queries, values, ROWS: tl.constexpr):
    """Writes one number a row."""
    pointers, inside = statistic_of(pointer, batch, head, heads, first, n_queries, ROWS)
    tl.store(pointers, values, mask=inside)


@triton.jit
def load_normaliser(pointer, batch, head, heads, first, n_queries, ROWS: tl.constexpr):
    """Log-sum-exp of the rows in base 2; +inf where it is -inf or outside, so that exp2(scores - it) is zero there."""
    pointers, inside = statistic_of(pointer, batch, head, heads, first, n_queries, ROWS)
    lse = tl.load(pointers, mask=inside, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def mask_scores(
    scores,
    mask,
    mask_start,
    head,
    rows,
    columns,
    first_row,
    first_column,
    n_rows,
    n_columns,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Scores of a tile with the additive mask added and -inf where the row may not attend to the key.

    ``rows`` and ``columns`` count from the tile's start and have whichever of the shapes [ROWS, 1] and [1, COLUMNS], or
    [1, ROWS] and [COLUMNS, 1], the scores have; ``columns`` are keys in both. ``MASK`` is "none", "boolean" (bytes) or
    "additive".
    """
    allowed = columns < n_columns - first_column
    if MASK != "none":
        start = mask_start + tl.cast(head, tl.int64) * mask.head + tl.cast(first_column, tl.int64) * mask.column
        offsets = columns * mask.column
        known = allowed
        if mask.row is not None:
            start += tl.cast(first_row, tl.int64) * mask.row
            offsets += rows * mask.row
            known = known & (rows < n_rows - first_row)
        values = tl.load(start + offsets, mask=known, other=0)
        if MASK == "boolean":
            allowed = allowed & (values != 0)
        else:
            bias = values.to(tl.float32)
            forbidden = bias <= FORBIDDEN
            scores += tl.where(forbidden, 0.0, bias) * LOG2E
            allowed = allowed & (forbidden == 0)
    if CAUSAL:
        allowed = allowed & (columns + first_column <= rows + first_row)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def mean_of_first_rows(matrix, batch, head, n_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean of the first ROWS rows: an estimate of the offset that all rows have in common.

    Rows of dS and of its tangent sum to zero, so subtracting any one vector from all keys changes no gradient; an
    estimate removes the rounding error of a large common offset as well as the exact mean would.
    """
    tile = load_tile(matrix, batch, head, 0, n_rows, ROWS, WIDTH, COLUMNS)
    return tl.sum(tile.to(tl.float32), 0) / tl.minimum(n_rows, ROWS)
