# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""Which tile of a mask's gradient a program makes, over what it sums, and how the tile is written."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from metafast.ops.attention.triton.common import keys_of, query_blocks_of


class MaskGradient(NamedTuple):
    """The gradient of a mask, ``[splits, batches, heads, rows, columns]`` in one piece.

    ``readers`` ``[batches, batch_readers]`` are the batches that read a batch of the mask, ``head_readers`` the number of
    heads that read one of its heads; ``rows`` and ``columns`` are None where the mask has one that all share.
    """

    pointer: Any
    readers: Any
    splits: Any
    batches: Any
    heads: Any
    rows: Any
    columns: Any
    batch_readers: Any
    head_readers: Any


@triton.jit
def tile_of_mask(gradient, n_queries, n_keys, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr):
    """This program's place in the gradient: split, batch, head, first row, first column."""
    program = tl.program_id(0)
    first_row = 0
    first_column = 0
    if gradient.columns is not None:
        blocks = tl.cdiv(n_keys, KEY_BLOCK)
        first_column = program % blocks * KEY_BLOCK
        program = program // blocks
    if gradient.rows is not None:
        blocks = tl.cdiv(n_queries, QUERY_BLOCK)
        first_row = program % blocks * QUERY_BLOCK
        program = program // blocks
    head = program % gradient.heads
    program = program // gradient.heads
    return program // gradient.batches, program % gradient.batches, head, first_row, first_column


@triton.jit
def blocks_read(
    gradient,
    settings,
    first_row,
    first_column,
    n_queries,
    n_keys,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """First and number of the blocks of queries, then of keys, that a tile of the gradient sums over.

    Which keys exist is another question for each batch that reads the mask.
    """
    row_block = 0
    row_blocks = 1
    column_block = 0
    column_blocks = 1
    if gradient.rows is not None:
        row_block = first_row // QUERY_BLOCK
        first, end = keys_of(settings, first_row, 0, n_keys, QUERY_BLOCK, KEY_BLOCK)
        if gradient.columns is not None:
            column_block = first_column // KEY_BLOCK
            column_blocks = ((first_column >= first) & (first_column < end)).to(tl.int32)
        else:
            column_block = first // KEY_BLOCK
            column_blocks = tl.maximum(tl.cdiv(end, KEY_BLOCK) - column_block, 0)
    elif gradient.columns is not None:
        column_block = first_column // KEY_BLOCK
        row_block, row_blocks = query_blocks_of(settings, first_column, 0, n_keys, n_queries, QUERY_BLOCK, KEY_BLOCK)
    else:
        row_blocks = tl.cdiv(n_queries, QUERY_BLOCK)
        column_blocks = tl.cdiv(n_keys, KEY_BLOCK)
    return row_block, row_blocks, column_block, column_blocks


@triton.jit
def share_of(split, splits, steps):
    """First and end of the steps that a split takes."""
    share = tl.cdiv(steps, splits)
    return split * share, tl.minimum(steps, (split + 1) * share)


@triton.jit
def reader_of(gradient, mask_batch, mask_head, reader):
    """Batch and head number ``reader`` of those that read a head of the mask."""
    # A mask of all heads is read by one each, a mask of one head by all: one of the two summands is zero.
    head = mask_head + reader % gradient.head_readers
    return tl.load(gradient.readers + mask_batch * gradient.batch_readers + reader // gradient.head_readers), head


@triton.jit
def store_mask_tile(
    gradient,
    split,
    batch,
    head,
    first_row,
    first_column,
    total,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """Sums a tile over what its rows and columns share, and writes it."""
    start = (tl.cast(split, tl.int64) * gradient.batches + batch) * gradient.heads + head
    inside = tl.full([1, 1], 1, dtype=tl.int1)
    if gradient.columns is None:
        # Before the rows are summed: whole rows sum to zero, and columns to large numbers of both signs.
        total = tl.sum(total, 1, keep_dims=True)
    if gradient.rows is not None:
        rows = first_row + tl.arange(0, QUERY_BLOCK)[:, None]
        inside = inside & (rows < gradient.rows)
        index = start * gradient.rows + rows
    else:
        total = tl.sum(total, 0, keep_dims=True)
        index = start + tl.zeros([1, 1], dtype=tl.int64)
    if gradient.columns is not None:
        columns = first_column + tl.arange(0, KEY_BLOCK)[None, :]
        inside = inside & (columns < gradient.columns)
        index = index * gradient.columns + columns
    tl.store(gradient.pointer + index, total.to(gradient.pointer.dtype.element_ty), mask=inside)
