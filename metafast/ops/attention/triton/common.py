# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""What the attention kernels share: their arguments, and how they find, read and write what is theirs."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


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


class Settings(NamedTuple):
    """What kernels are told besides tensors, their sizes and the mask. None means that there is no code for it.

    One flat tuple: Triton loses the constants of tuples inside of tuples.

    Row i attends to columns i - ``left`` <= j < i + ``end``, either of which may be negative; None: no limit. Not
    <= i + right: under a causal mask ``end`` is then 1, which Triton compiles as a constant. ``key_ranges`` are two numbers
    a batch: the first key that exists, and the one after the last. Dropout, if there are ``dropout_seeds``, one a batch,
    keeps a weight and multiplies it by ``dropout_factor`` where its random word is at least ``dropout_threshold``.
    ``scale`` multiplies scores.
    """

    left: Any
    end: Any
    key_ranges: Any
    dropout_seeds: Any
    dropout_threshold: Any
    dropout_factor: Any
    scale: Any


@triton.jit
def locate(n_blocks, heads):
    """Block, batch and head of this program."""
    program = tl.program_id(0)
    matrix = program // n_blocks
    return program % n_blocks, matrix // heads, matrix % heads


@triton.jit
def existing_keys(settings, batch, n_keys):
    """First and end of the keys of a batch that exist."""
    if settings.key_ranges is None:
        return 0, n_keys
    else:  # noqa: RET505 - Triton would compile what follows a return too
        of_batch = settings.key_ranges + 2 * batch
        return tl.load(of_batch).to(tl.int32), tl.load(of_batch + 1).to(tl.int32)


@triton.jit
def has_keys(settings, first_key, key_begin, key_end, KEY_BLOCK: tl.constexpr):
    """Whether some of a block's keys exist."""
    if settings.key_ranges is None:
        return True
    else:  # noqa: RET505 - Triton would compile what follows a return too
        return (first_key < key_end) & (first_key + KEY_BLOCK > key_begin)


@triton.jit
def keys_of(settings, first_query, key_begin, key_end, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr):
    """First and end of the keys that some row of a block may attend to, masks aside, from a block's border on.

    ``key_begin`` and ``key_end`` are the first and the end of those that exist.
    """
    first = key_begin
    end = key_end
    if settings.left is not None:
        first = tl.maximum(first_query - settings.left, first)
    if settings.end is not None:
        end = tl.minimum(end, first_query + QUERY_BLOCK - 1 + settings.end)
    return first // KEY_BLOCK * KEY_BLOCK, end


@triton.jit
def query_blocks_of(
    settings, first_key, key_begin, key_end, n_queries, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr
):
    """First block of queries of which some row may attend to a block of keys, masks aside, and how many there are.

    ``key_begin`` and ``key_end`` are the first and the end of the keys that exist.
    """
    first = 0
    end = n_queries
    if settings.end is not None:
        first = tl.maximum(first_key + 1 - settings.end, 0) // QUERY_BLOCK
    if settings.left is not None:
        end = tl.minimum(n_queries, first_key + KEY_BLOCK + settings.left)
    if settings.key_ranges is not None:
        end = tl.where(has_keys(settings, first_key, key_begin, key_end, KEY_BLOCK), end, 0)
    return first, tl.maximum(tl.cdiv(end, QUERY_BLOCK) - first, 0)


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
def mean_of_first_rows(matrix, batch, head, begin, end, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean of the first ROWS rows from ``begin`` on, of those before ``end``: an estimate of the offset that all have in
    common.

    Rows of dS and of its tangent sum to zero, so subtracting any one vector from all keys changes no gradient; an
    estimate removes the rounding error of a large common offset as well as the exact mean would.
    """
    tile = load_tile(matrix, batch, head, begin, end, ROWS, WIDTH, COLUMNS)
    return tl.sum(tile.to(tl.float32), 0) / tl.maximum(tl.minimum(end - begin, ROWS), 1)
