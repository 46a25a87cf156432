# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""What the attention kernels share: how they find their tile, read and write it, mask scores and drop weights.

Inside the kernels scores are in base 2, S · log2(e), which is what the hardware's exponential takes; so are the saved row
statistics, which only these kernels read. Masks and their tangents are in natural units.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Finite numbers of an additive mask below this would be -inf in base 2 and forbid, where the caller only added something.
LOWEST = tl.constexpr(-2.3e38)


class Matrix(NamedTuple):
    """A ``[batch, head, row, column]`` tensor: its data and its strides in elements; columns are contiguous."""

    pointer: Any
    batch: Any
    head: Any
    row: Any


class Mask(NamedTuple):
    """An attention mask: its data (bytes: 0 forbids; floating: added), the batch of it that each batch reads (None: the
    same number), its strides.

    A stride is 0 where the mask is broadcast; ``row`` is None there, so that one row is read and not many equal ones.
    All is None where there is no mask: Triton can ask a field whether it is None, but not a tuple that has such fields.
    """

    pointer: Any
    batches: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Window(NamedTuple):
    """Row i attends to columns i - left <= j < i + end; None: no limit, and no code for one.

    Not <= i + right: under a causal mask ``end`` is then 1, which Triton compiles as a constant.
    """

    left: Any
    end: Any


class Dropout(NamedTuple):
    """A weight is kept, and multiplied by ``factor``, where its random word is at least ``threshold``; a seed a batch.

    All is None without dropout.
    """

    seeds: Any
    threshold: Any
    factor: Any


@triton.jit
def locate(n_blocks, heads):
    """Block, batch and head of this program."""
    program = tl.program_id(0)
    matrix = program // n_blocks
    return program % n_blocks, matrix // heads, matrix % heads


@triton.jit
def keys_of(window, first_query, n_keys, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr):
    """First and end of the keys that the window lets some row of a block attend to, from a block's border on."""
    first = 0
    end = n_keys
    if window.left is not None:
        first = tl.maximum(first_query - window.left, 0) // KEY_BLOCK * KEY_BLOCK
    if window.end is not None:
        end = tl.minimum(n_keys, first_query + QUERY_BLOCK - 1 + window.end)
    return first, end


@triton.jit
def query_blocks_of(window, first_key, n_queries, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr):
    """First block of queries of which the window lets some row attend to a block of keys, and how many there are."""
    first = 0
    end = n_queries
    if window.end is not None:
        first = tl.maximum(first_key + 1 - window.end, 0) // QUERY_BLOCK
    if window.left is not None:
        end = tl.minimum(n_queries, first_key + KEY_BLOCK + window.left)
    return first, tl.maximum(tl.cdiv(end, QUERY_BLOCK) - first, 0)


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
def seed_of(dropout, batch):
    """The seed of a batch; without dropout a zero that nothing reads."""
    if dropout.seeds is None:
        return 0
    else:  # noqa: RET505 - Triton would compile what follows a return too
        return tl.load(dropout.seeds + batch)


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
def statistic_of(pointer, batch, head, heads, first, n_queries, ROWS: tl.constexpr, NUMBERS: tl.constexpr):
    """Pointers to the first of NUMBERS a row in a contiguous [batch, head, row], and which of them lie inside."""
    rows = tl.arange(0, ROWS)
    start = pointer + (tl.cast(batch * heads + head, tl.int64) * n_queries + first) * NUMBERS
    return start + rows * NUMBERS, rows < n_queries - first


@triton.jit
def load_statistic(pointer, batch, head, heads, first, n_queries, ROWS: tl.constexpr):
    """One number a row, zero outside."""
    pointers, inside = statistic_of(pointer, batch, head, heads, first, n_queries, ROWS, 1)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_statistic(pointer, batch, head, heads, first, n_queries, values, ROWS: tl.constexpr):
    """Writes one number a row."""
    pointers, inside = statistic_of(pointer, batch, head, heads, first, n_queries, ROWS, 1)
    tl.store(pointers, values, mask=inside)


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
def load_mask(mask, mask_start, head, rows, columns, first_row, first_column, n_rows, n_columns):
    """A tile of a mask, zero outside; of one row where the mask has one. ``rows`` and ``columns`` as in mask_scores."""
    start = mask_start + tl.cast(head, tl.int64) * mask.head + tl.cast(first_column, tl.int64) * mask.column
    offsets = columns * mask.column
    inside = columns < n_columns - first_column
    if mask.row is not None:
        start += tl.cast(first_row, tl.int64) * mask.row
        offsets += rows * mask.row
        inside = inside & (rows < n_rows - first_row)
    return tl.load(start + offsets, mask=inside, other=0)


@triton.jit
def mask_scores(scores, mask, mask_start, window, head, rows, columns, first_row, first_column, n_rows, n_columns):
    """Scores of a tile with the additive mask added and -inf where the row may not attend to the key.

    ``rows`` and ``columns`` count from the tile's start and have whichever of the shapes [ROWS, 1] and [1, COLUMNS], or
    [1, ROWS] and [COLUMNS, 1], the scores have; ``columns`` are keys in both.
    """
    allowed = columns < n_columns - first_column
    if mask.pointer is not None:
        values = load_mask(mask, mask_start, head, rows, columns, first_row, first_column, n_rows, n_columns)
        if is_additive(mask.pointer):
            bias = values.to(tl.float32)
            scores += tl.where((bias < LOWEST) & (bias > float("-inf")), LOWEST, bias) * LOG2E
        else:
            allowed = allowed & (values != 0)
    if window.left is not None:
        allowed = allowed & (columns + first_column >= rows + (first_row - window.left))
    if window.end is not None:
        allowed = allowed & (columns + first_column < rows + (first_row + window.end))
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def dropout_factors(dropout, seed, head, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What dropout multiplies the weights of a tile by, [ROWS, COLUMNS]: its factor or zero.

    The word of (head, row, column) is number column % 4 of Philox-4x32-10 at the counter (column // 4, row, head, 0) under
    the batch's seed: whatever tile it is in, and in the reference. A counter serves four columns; tiles start at
    multiples of 16.
    """
    quads = first_column // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    rows = first_row + tl.arange(0, ROWS)[:, None]
    words = tl.philox(seed, quads, rows, head, 0)
    threshold = tl.cast(dropout.threshold, tl.uint32)
    # Joined as bytes: the tile then changes its layout at a quarter of the cost.
    first, second = (words[0] >= threshold).to(tl.int8), (words[1] >= threshold).to(tl.int8)
    third, fourth = (words[2] >= threshold).to(tl.int8), (words[3] >= threshold).to(tl.int8)
    keep = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [ROWS, COLUMNS])
    return tl.where(keep != 0, dropout.factor, 0.0)


@triton.jit
def mean_of_first_rows(matrix, batch, head, n_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean of the first ROWS rows: an estimate of the offset that all rows have in common.

    Rows of dS and of its tangent sum to zero, so subtracting any one vector from all keys changes no gradient; an
    estimate removes the rounding error of a large common offset as well as the exact mean would.
    """
    tile = load_tile(matrix, batch, head, 0, n_rows, ROWS, WIDTH, COLUMNS)
    return tl.sum(tile.to(tl.float32), 0) / tl.minimum(n_rows, ROWS)
