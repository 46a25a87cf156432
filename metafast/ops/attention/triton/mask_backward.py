# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""The gradient of an additive mask and its tangent: dS and dṠ, summed over the dimensions in which the mask is broadcast.

A program makes a tile of the gradient. It goes over all batches and heads that read this tile, over all queries where
the mask has one row and over all keys where it has one column; nothing is summed by atomics. A small mask that much is
summed over would keep few programs busy: these sums are split, and the parts added by torch.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metafast.ops.attention.triton.common import (
    LOG2E,
    dropout_factors,
    keys_of,
    load_mask,
    load_softmax,
    load_statistic,
    load_tile,
    mask_of,
    mask_scores,
    query_blocks_of,
    seed_of,
)
from metafast.ops.attention.triton.config import Config
from metafast.ops.attention.triton.delta import deltas
from metafast.ops.attention.triton.jvp import jvp_and_mean
from metafast.ops.attention.triton.launch import Options, Problem, matrix

# About as many programs as keep a large GPU busy; the block size is only for counting them.
PROGRAMS = 512
BLOCK = 64


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
    window,
    first_row,
    first_column,
    n_queries,
    n_keys,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """First and number of the blocks of queries, then of keys, that a tile of the gradient sums over."""
    row_block = 0
    row_blocks = 1
    column_block = 0
    column_blocks = 1
    if gradient.rows is not None:
        row_block = first_row // QUERY_BLOCK
        first, end = keys_of(window, first_row, n_keys, QUERY_BLOCK, KEY_BLOCK)
        if gradient.columns is not None:
            column_block = first_column // KEY_BLOCK
            column_blocks = ((first_column >= first) & (first_column < end)).to(tl.int32)
        else:
            column_block = first // KEY_BLOCK
            column_blocks = tl.maximum(tl.cdiv(end, KEY_BLOCK) - column_block, 0)
    elif gradient.columns is not None:
        column_block = first_column // KEY_BLOCK
        row_block, row_blocks = query_blocks_of(window, first_column, n_queries, QUERY_BLOCK, KEY_BLOCK)
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


@triton.jit(do_not_specialize=["n_queries", "heads"])
def mask_backward_kernel(
    grad_out,
    query,
    key,
    value,
    statistics,
    delta,
    gradient,
    mask,
    window,
    dropout,
    n_queries,
    n_keys,
    heads,
    group,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split, mask_batch, mask_head, first_row, first_column = tile_of_mask(
        gradient, n_queries, n_keys, QUERY_BLOCK, KEY_BLOCK
    )
    row_block, row_blocks, column_block, column_blocks = blocks_read(
        gradient, window, first_row, first_column, n_queries, n_keys, QUERY_BLOCK, KEY_BLOCK
    )
    rows = tl.arange(0, QUERY_BLOCK)[:, None]
    columns = tl.arange(0, KEY_BLOCK)[None, :]
    total = tl.zeros([QUERY_BLOCK, KEY_BLOCK], dtype=tl.float32)
    blocks = row_blocks * column_blocks
    begin, end = share_of(split, gradient.splits, gradient.batch_readers * gradient.head_readers * blocks)
    for step in range(begin, end):
        batch, head = reader_of(gradient, mask_batch, mask_head, step // blocks)
        first_query = (row_block + step % blocks // column_blocks) * QUERY_BLOCK
        first_key = (column_block + step % column_blocks) * KEY_BLOCK
        kv_head = head // group
        mask_start = mask_of(mask, batch)
        q = load_tile(query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        g = load_tile(grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        largest, log_total = load_softmax(
            statistics, query, mask, batch, head, heads, first_query, n_queries, QUERY_BLOCK
        )
        d = load_statistic(delta, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s = mask_scores(s, mask, mask_start, window, head, rows, columns, first_query, first_key, n_queries, n_keys)
        p = tl.exp2(s - largest[:, None] - log_total[:, None])
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if dropout.seeds is not None:
            seed = seed_of(dropout, batch)
            dp *= dropout_factors(dropout, seed, head, first_query, first_key, QUERY_BLOCK, KEY_BLOCK)
        total += p * (dp - d[:, None])
    store_mask_tile(gradient, split, mask_batch, mask_head, first_row, first_column, total, QUERY_BLOCK, KEY_BLOCK)


@triton.jit(do_not_specialize=["n_queries", "heads"])
def mask_backward_jvp_kernel(
    grad_out,
    query,
    key,
    value,
    statistics,
    tangent_query,
    tangent_key,
    tangent_value,
    tangent_mask,
    tangent_grad_out,
    mu,
    delta,
    tangent_delta,
    gradient,
    mask,
    window,
    dropout,
    n_queries,
    n_keys,
    heads,
    group,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split, mask_batch, mask_head, first_row, first_column = tile_of_mask(
        gradient, n_queries, n_keys, QUERY_BLOCK, KEY_BLOCK
    )
    row_block, row_blocks, column_block, column_blocks = blocks_read(
        gradient, window, first_row, first_column, n_queries, n_keys, QUERY_BLOCK, KEY_BLOCK
    )
    rows = tl.arange(0, QUERY_BLOCK)[:, None]
    columns = tl.arange(0, KEY_BLOCK)[None, :]
    total = tl.zeros([QUERY_BLOCK, KEY_BLOCK], dtype=tl.float32)
    blocks = row_blocks * column_blocks
    begin, end = share_of(split, gradient.splits, gradient.batch_readers * gradient.head_readers * blocks)
    for step in range(begin, end):
        batch, head = reader_of(gradient, mask_batch, mask_head, step // blocks)
        first_query = (row_block + step % blocks // column_blocks) * QUERY_BLOCK
        first_key = (column_block + step % column_blocks) * KEY_BLOCK
        kv_head = head // group
        mask_start = mask_of(mask, batch)
        q = load_tile(query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        tq = load_tile(tangent_query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        tk = load_tile(tangent_key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        largest, log_total = load_softmax(
            statistics, query, mask, batch, head, heads, first_query, n_queries, QUERY_BLOCK
        )
        mean = load_statistic(mu, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        d = load_statistic(delta, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        td = load_statistic(tangent_delta, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s = mask_scores(s, mask, mask_start, window, head, rows, columns, first_query, first_key, n_queries, n_keys)
        p = tl.exp2(s - largest[:, None] - log_total[:, None])
        t = tl.dot(tq, tl.trans(k), input_precision=PRECISION)
        t = tl.dot(q, tl.trans(tk), t, input_precision=PRECISION) * scale - mean[:, None]
        if tangent_mask.pointer is not None:
            tangent_start = mask_of(tangent_mask, batch)
            t += load_mask(
                tangent_mask, tangent_start, head, rows, columns, first_query, first_key, n_queries, n_keys
            ).to(tl.float32)
        g = load_tile(grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        tv = load_tile(tangent_value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        e = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        f = tl.dot(g, tl.trans(tv), input_precision=PRECISION)
        if tangent_grad_out is not None:
            tg = load_tile(tangent_grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
            f = tl.dot(tg, tl.trans(v), f, input_precision=PRECISION)
        if dropout.seeds is not None:
            seed = seed_of(dropout, batch)
            kept = dropout_factors(dropout, seed, head, first_query, first_key, QUERY_BLOCK, KEY_BLOCK)
            e *= kept
            f *= kept
        total += p * (t * (e - d[:, None]) + f - td[:, None])
    store_mask_tile(gradient, split, mask_batch, mask_head, first_row, first_column, total, QUERY_BLOCK, KEY_BLOCK)


def mask_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    *options: *Options,
) -> Tensor:
    """Gradient of an additive mask.

    Args: as of :func:`backward`; the mask among ``options`` is floating.

    Returns:
        shaped and typed as the mask: summed over the dimensions in which it is 1 and the scores are not.
    """
    problem = Problem(query, key, value, *options)
    delta, _ = deltas(problem, grad_out, out)
    return _gradient(
        problem,
        mask_backward_kernel,
        options[0],
        "delta",
        grad_out=matrix(problem.flatten(grad_out)),
        query=matrix(problem.flatten(query)),
        key=matrix(problem.flatten(key)),
        value=matrix(problem.flatten(value)),
        statistics=statistics.contiguous(),
        delta=delta,
    )


def mask_backward_jvp(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    tangent_mask: Tensor | None,
    tangent_grad_out: Tensor | None,
    *options: *Options,
) -> Tensor:
    """Tangent of the gradient of an additive mask.

    Args: as of :func:`backward_jvp`; the mask among ``options`` is floating.

    Returns:
        shaped and typed as the mask.
    """
    problem = Problem(query, key, value, *options)
    tangent_out, mu = jvp_and_mean(
        problem, query, key, value, out, statistics, tangent_query, tangent_key, tangent_value, tangent_mask
    )
    delta, tangent_delta = deltas(problem, grad_out, out, tangent_grad_out, tangent_out)
    return _gradient(
        problem,
        mask_backward_jvp_kernel,
        options[0],
        "tangent_delta",
        grad_out=matrix(problem.flatten(grad_out)),
        query=matrix(problem.flatten(query)),
        key=matrix(problem.flatten(key)),
        value=matrix(problem.flatten(value)),
        statistics=statistics.contiguous(),
        tangent_query=matrix(problem.flatten(tangent_query)),
        tangent_key=matrix(problem.flatten(tangent_key)),
        tangent_value=matrix(problem.flatten(tangent_value)),
        tangent_mask=problem.describe_mask(tangent_mask),
        tangent_grad_out=None if tangent_grad_out is None else matrix(problem.flatten(tangent_grad_out)),
        mu=mu,
        delta=delta,
        tangent_delta=tangent_delta,
    )


def _gradient(problem: Problem, kernel: Any, mask: Tensor | None, subtrahend: str, **arguments: Any) -> Tensor:
    """The gradient of a mask by ``kernel``, which sums P * (… - the argument named ``subtrahend``: D or its tangent)."""
    if mask is None or mask.dtype == torch.bool:
        raise TypeError("attn_mask: only a floating mask has a gradient")
    if mask.shape[-1] == 1:
        # Whole rows are summed, to zero but for rounding: what the kernel finds instead is the error of what it subtracts.
        statistic = arguments[subtrahend]
        statistic += _sums(problem, kernel, statistic[..., None], **arguments)[..., 0]
    return _sums(problem, kernel, mask, **arguments)


def _sums(problem: Problem, kernel: Any, mask: Tensor, **arguments: Any) -> Tensor:
    """Launches a kernel over tiles of the gradient, shaped and typed as ``mask``, and adds its parts."""
    lead, (heads, rows, columns) = mask.shape[:-3], mask.shape[-3:]
    batches = math.prod(lead)
    if mask.numel() == 0 or problem.batches == 0:
        return mask.new_zeros(mask.shape)
    tiles = batches * heads * triton.cdiv(rows, BLOCK) * triton.cdiv(columns, BLOCK)
    steps = problem.batches * problem.heads * triton.cdiv(problem.n_queries, BLOCK) * triton.cdiv(problem.n_keys, BLOCK)
    splits = max(1, min(PROGRAMS // tiles, steps // tiles))
    dtype = mask.dtype if splits == 1 else torch.float32
    parts = torch.empty(splits, *mask.shape, dtype=dtype, device=mask.device)
    gradient = MaskGradient(
        parts,
        _readers(problem.lead, lead, mask.device),
        splits,
        batches,
        heads,
        rows if rows > 1 else None,
        columns if columns > 1 else None,
        problem.batches // batches,
        problem.heads // heads,
    )

    def programs(config: Config) -> int:
        return splits * batches * heads * triton.cdiv(rows, config.query_block) * triton.cdiv(columns, config.key_block)

    problem.launch(kernel, programs, gradient=gradient, **arguments)
    return parts[0] if splits == 1 else parts.sum(0).to(mask.dtype)


def _readers(lead: list[int], mask_lead: torch.Size, device: torch.device) -> Tensor:
    """For each batch of the mask the batches that read it, int32 ``[mask batches, readers]``."""
    own = [dim for dim, size in enumerate(mask_lead) if size > 1]
    shared = [dim for dim, size in enumerate(mask_lead) if size == 1]
    batches = torch.arange(math.prod(lead), dtype=torch.int32, device=device).view(lead)
    return batches.permute((*own, *shared)).reshape(math.prod(mask_lead), -1).contiguous()
