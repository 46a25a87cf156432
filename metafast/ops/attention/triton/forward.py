# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""Forward pass: a program a block of queries, online softmax over the keys (FlashAttention-2, arXiv 2307.08691)."""

import triton
import triton.language as tl
from torch import Tensor

from metafast.ops.attention.options import Told
from metafast.ops.attention.triton.common import existing_keys, keys_of, load_tile, locate, store_tile
from metafast.ops.attention.triton.launch import Problem, empty_like, matrix
from metafast.ops.attention.triton.scores import (
    Tile,
    dropout_factors,
    dropped,
    mask_of,
    rows_and_columns,
    scores,
    seed_of,
    store_softmax,
)


@triton.jit(do_not_specialize=["n_queries", "heads"])
def forward_kernel(
    query,
    key,
    value,
    out,
    statistics,
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
    block, batch, head = locate(tl.cdiv(n_queries, QUERY_BLOCK), heads)
    kv_head = head // group
    first_query = block * QUERY_BLOCK
    mask_start = mask_of(mask, batch)
    seed = seed_of(settings, batch)
    rows, columns = rows_and_columns(QUERY_BLOCK, KEY_BLOCK, by_keys)
    key_begin, key_end = existing_keys(settings, batch, n_keys)
    start, end = keys_of(settings, first_query, key_begin, key_end, QUERY_BLOCK, KEY_BLOCK)

    q = load_tile(query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    largest = tl.full([QUERY_BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([QUERY_BLOCK], dtype=tl.float32)
    weighted = tl.zeros([QUERY_BLOCK, VALUE_BLOCK], dtype=tl.float32)
    for first_key in range(start, end, KEY_BLOCK):
        k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        tile = Tile(head, first_query, first_key, n_queries, n_keys, key_begin, key_end, rows, columns, mask_start)
        s = scores(q, k, mask, settings, tile, by_keys, PRECISION)
        now_largest = tl.maximum(largest, tl.max(s, 1))
        # A row without any key so far has only -inf, and -inf - (-inf) would be NaN.
        shift = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(p, 1)
        kept = dropout_factors(settings, seed, tile, QUERY_BLOCK, KEY_BLOCK, by_keys)
        p = dropped(p, kept, settings)
        v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        weighted = tl.dot(p.to(v.dtype), v, weighted * decay[:, None], input_precision=PRECISION)
        largest = now_largest

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    weighted = weighted / total[:, None]
    store_tile(out, batch, head, first_query, n_queries, weighted, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    largest = tl.where(empty, float("inf"), largest)
    store_softmax(statistics, batch, head, heads, first_query, n_queries, largest, tl.log2(total), QUERY_BLOCK)


def forward(query: Tensor, key: Tensor, value: Tensor, *told: *Told) -> tuple[Tensor, Tensor]:
    """Attention and the statistics of its softmax.

    Args: see the package.

    Returns:
        ``out`` ``[*lead, Hq, Nq, Dv]`` in the dtype of ``query`` and, where ``Dv == D``, in its memory order;
        ``statistics`` ``[*lead, Hq, Nq, 2]``, float32, for the other ops alone: the largest score of each row and log2 of
        the sum of its exponentials relative to that, scores being in base 2; (inf, 0) for rows that may attend to
        nothing, whose ``out`` is zero.
    """
    problem = Problem(query, key, value, *told)
    query, key, value = (problem.flatten(tensor) for tensor in (query, key, value))
    out, statistics = empty_like(query, problem.value_dim), problem.empty_statistic(2)
    problem.launch(
        forward_kernel,
        problem.query_programs,
        query=matrix(query),
        key=matrix(key),
        value=matrix(value),
        out=matrix(out),
        statistics=statistics,
    )
    return problem.unflatten(out), statistics
