# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""The gradient of an additive mask and its tangent: dS and dṠ, summed over the dimensions in which the mask is broadcast.

A program makes a tile of the gradient. It goes over all batches and heads that read this tile, over all queries where
the mask has one row and over all keys where it has one column; nothing is summed by atomics. A small mask that much is
summed over would keep few programs busy: these sums are split, and the parts added by torch.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metafast.ops.attention.options import Told
from metafast.ops.attention.triton.common import existing_keys, has_keys, load_statistic, load_tile
from metafast.ops.attention.triton.delta import deltas
from metafast.ops.attention.triton.jvp import jvp_and_mean
from metafast.ops.attention.triton.launch import Problem, matrix
from metafast.ops.attention.triton.mask_tiles import (
    MaskGradient,
    blocks_read,
    reader_of,
    share_of,
    store_mask_tile,
    tile_of_mask,
)
from metafast.ops.attention.triton.scores import (
    Tile,
    add_tangent_mask,
    dropout_factors,
    dropped,
    load_softmax,
    mask_of,
    product,
    rows_and_columns,
    seed_of,
    tangent_scores,
    weights,
)
from metafast.ops.attention.triton.tiles import Config

# About as many programs as keep a large GPU busy; the block size is only for counting them.
PROGRAMS = 512
BLOCK = 64


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
    n_queries,
    n_keys,
    heads,
    group,
    settings,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    by_keys: tl.constexpr = False
    split, mask_batch, mask_head, first_row, first_column = tile_of_mask(
        gradient, n_queries, n_keys, QUERY_BLOCK, KEY_BLOCK
    )
    row_block, row_blocks, column_block, column_blocks = blocks_read(
        gradient, settings, first_row, first_column, n_queries, n_keys, QUERY_BLOCK, KEY_BLOCK
    )
    rows, columns = rows_and_columns(QUERY_BLOCK, KEY_BLOCK, by_keys)
    total = tl.zeros([QUERY_BLOCK, KEY_BLOCK], dtype=tl.float32)
    blocks = row_blocks * column_blocks
    begin, end = share_of(split, gradient.splits, gradient.batch_readers * gradient.head_readers * blocks)
    for step in range(begin, end):
        batch, head = reader_of(gradient, mask_batch, mask_head, step // blocks)
        first_query = (row_block + step % blocks // column_blocks) * QUERY_BLOCK
        first_key = (column_block + step % column_blocks) * KEY_BLOCK
        key_begin, key_end = existing_keys(settings, batch, n_keys)
        if has_keys(settings, first_key, key_begin, key_end, KEY_BLOCK):
            kv_head = head // group
            mask_start = mask_of(mask, batch)
            tile = Tile(head, first_query, first_key, n_queries, n_keys, key_begin, key_end, rows, columns, mask_start)
            q = load_tile(query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
            k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
            g = load_tile(grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
            v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
            largest, log_total = load_softmax(
                statistics, query, mask, batch, head, heads, first_query, n_queries, QUERY_BLOCK
            )
            d = load_statistic(delta, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
            p = weights(q, k, largest, log_total, mask, settings, tile, by_keys, PRECISION)
            dp = product(g, v, None, by_keys, PRECISION)
            seed = seed_of(settings, batch)
            kept = dropout_factors(settings, seed, tile, QUERY_BLOCK, KEY_BLOCK, by_keys)
            dp = dropped(dp, kept, settings)
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
    n_queries,
    n_keys,
    heads,
    group,
    settings,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    by_keys: tl.constexpr = False
    split, mask_batch, mask_head, first_row, first_column = tile_of_mask(
        gradient, n_queries, n_keys, QUERY_BLOCK, KEY_BLOCK
    )
    row_block, row_blocks, column_block, column_blocks = blocks_read(
        gradient, settings, first_row, first_column, n_queries, n_keys, QUERY_BLOCK, KEY_BLOCK
    )
    rows, columns = rows_and_columns(QUERY_BLOCK, KEY_BLOCK, by_keys)
    total = tl.zeros([QUERY_BLOCK, KEY_BLOCK], dtype=tl.float32)
    blocks = row_blocks * column_blocks
    begin, end = share_of(split, gradient.splits, gradient.batch_readers * gradient.head_readers * blocks)
    for step in range(begin, end):
        batch, head = reader_of(gradient, mask_batch, mask_head, step // blocks)
        first_query = (row_block + step % blocks // column_blocks) * QUERY_BLOCK
        first_key = (column_block + step % column_blocks) * KEY_BLOCK
        key_begin, key_end = existing_keys(settings, batch, n_keys)
        if has_keys(settings, first_key, key_begin, key_end, KEY_BLOCK):
            kv_head = head // group
            mask_start = mask_of(mask, batch)
            tile = Tile(head, first_query, first_key, n_queries, n_keys, key_begin, key_end, rows, columns, mask_start)
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
            p = weights(q, k, largest, log_total, mask, settings, tile, by_keys, PRECISION)
            t = tangent_scores(q, k, tq, tk, mean, settings.scale, by_keys, PRECISION)
            tangent_mask_start = mask_of(tangent_mask, batch)
            t = add_tangent_mask(t, tangent_mask, tangent_mask_start, tile)
            g = load_tile(grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
            v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
            tv = load_tile(tangent_value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
            e = product(g, v, None, by_keys, PRECISION)
            f = product(g, tv, None, by_keys, PRECISION)
            if tangent_grad_out is not None:
                tg = load_tile(
                    tangent_grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK
                )
                f = product(tg, v, f, by_keys, PRECISION)
            seed = seed_of(settings, batch)
            kept = dropout_factors(settings, seed, tile, QUERY_BLOCK, KEY_BLOCK, by_keys)
            e, f = dropped(e, kept, settings), dropped(f, kept, settings)
            total += p * (t * (e - d[:, None]) + f - td[:, None])
    store_mask_tile(gradient, split, mask_batch, mask_head, first_row, first_column, total, QUERY_BLOCK, KEY_BLOCK)


def mask_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    *told: *Told,
) -> Tensor:
    """Gradient of an additive mask.

    Args: as of :func:`backward`; the mask is floating.

    Returns:
        shaped and typed as the mask: summed over the dimensions in which it is 1 and the scores are not.
    """
    problem = Problem(query, key, value, *told)
    delta, _ = deltas(problem, grad_out, out)
    return _gradient(
        problem,
        mask_backward_kernel,
        told[0],
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
    *told: *Told,
) -> Tensor:
    """Tangent of the gradient of an additive mask.

    Args: as of :func:`backward_jvp`; the mask is floating.

    Returns:
        shaped and typed as the mask.
    """
    problem = Problem(query, key, value, *told)
    tangent_out, mu = jvp_and_mean(
        problem, query, key, value, out, statistics, tangent_query, tangent_key, tangent_value, tangent_mask
    )
    delta, tangent_delta = deltas(problem, grad_out, out, tangent_grad_out, tangent_out)
    return _gradient(
        problem,
        mask_backward_jvp_kernel,
        told[0],
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
