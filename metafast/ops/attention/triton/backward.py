# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""Backward pass without atomics: a kernel over blocks of queries for dQ, then one over blocks of keys for dK and dV.

    P = softmax(S),  D = rowsum(dO * O),  dS = P * (keep * dO V^T - D),  dQ = s dS K,  dK = s dS^T Q,  dV = (keep * P)^T dO

where dropout's keep is 0 or 1 / (1 - its probability).
The first kernel leaves D for the second (Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2, split in two). It sees whole
rows, and in float32 corrects D by what its rows of dS sum to instead of zero: rowsum(dO * O) is not rounded as dP is. In a
half type that sum is mostly the rounding of each dS, and says nothing of D.
"""

import triton
import triton.language as tl
from torch import Tensor

from metafast.ops.attention.options import Told
from metafast.ops.attention.triton.common import (
    existing_keys,
    keys_of,
    load_statistic,
    load_tile,
    locate,
    mean_of_first_rows,
    query_blocks_of,
    store_statistic,
    store_tile,
)
from metafast.ops.attention.triton.launch import Problem, empty_like, matrix
from metafast.ops.attention.triton.scores import (
    Tile,
    dropout_factors,
    dropped,
    load_softmax,
    mask_of,
    product,
    rows_and_columns,
    seed_of,
    weights,
)


@triton.jit(do_not_specialize=["n_queries", "heads"])
def backward_query_kernel(
    grad_out,
    query,
    key,
    value,
    out,
    statistics,
    delta,
    grad_query,
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
    g = load_tile(grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    o = load_tile(out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if q.dtype != tl.float32:
        # Not at the end, where the other dtype's is: it would cost registers.
        store_statistic(delta, batch, head, heads, first_query, n_queries, d, QUERY_BLOCK)
    largest, log_total = load_softmax(statistics, query, mask, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
    gradient = tl.zeros([QUERY_BLOCK, HEAD_BLOCK], dtype=tl.float32)
    excess = tl.zeros([QUERY_BLOCK], dtype=tl.float32)
    for first_key in range(start, end, KEY_BLOCK):
        k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        tile = Tile(head, first_query, first_key, n_queries, n_keys, key_begin, key_end, rows, columns, mask_start)
        p = weights(q, k, largest, log_total, mask, settings, tile, by_keys, PRECISION)
        dp = product(g, v, None, by_keys, PRECISION)
        kept = dropout_factors(settings, seed, tile, QUERY_BLOCK, KEY_BLOCK, by_keys)
        dp = dropped(dp, kept, settings)
        ds = (p * (dp - d[:, None])).to(k.dtype)
        gradient = tl.dot(ds, k, gradient, input_precision=PRECISION)
        excess += tl.sum(ds.to(tl.float32), 1)

    # Rows of dS sum to zero; what rounding leaves of that sum would multiply the keys' common offset.
    offset = mean_of_first_rows(key, batch, kv_head, key_begin, key_end, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    gradient = settings.scale * (gradient - excess[:, None] * offset[None, :])
    store_tile(grad_query, batch, head, first_query, n_queries, gradient, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    if q.dtype == tl.float32:
        store_statistic(delta, batch, head, heads, first_query, n_queries, d + excess, QUERY_BLOCK)


@triton.jit(do_not_specialize=["n_queries", "heads"])
def backward_key_kernel(
    grad_out,
    query,
    key,
    value,
    statistics,
    delta,
    grad_key,
    grad_value,
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
    by_keys: tl.constexpr = True
    # Tiles are transposed, [KEY_BLOCK, QUERY_BLOCK], so that the left operands of the products are there as they are.
    block, batch, kv_head = locate(tl.cdiv(n_keys, KEY_BLOCK), heads // group)
    first_key = block * KEY_BLOCK
    rows, columns = rows_and_columns(QUERY_BLOCK, KEY_BLOCK, by_keys)
    mask_start = mask_of(mask, batch)
    seed = seed_of(settings, batch)
    # One loop over the query blocks of all heads of the group; two nested ones cost more registers.
    key_begin, key_end = existing_keys(settings, batch, n_keys)
    first_block, n_blocks = query_blocks_of(settings, first_key, key_begin, key_end, n_queries, QUERY_BLOCK, KEY_BLOCK)

    k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    to_key = tl.zeros([KEY_BLOCK, HEAD_BLOCK], dtype=tl.float32)
    to_value = tl.zeros([KEY_BLOCK, VALUE_BLOCK], dtype=tl.float32)
    for index in range(0, group * n_blocks):
        head = kv_head * group + index // n_blocks
        first_query = (first_block + index % n_blocks) * QUERY_BLOCK
        q = load_tile(query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        g = load_tile(grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        largest, log_total = load_softmax(
            statistics, query, mask, batch, head, heads, first_query, n_queries, QUERY_BLOCK
        )
        d = load_statistic(delta, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        tile = Tile(head, first_query, first_key, n_queries, n_keys, key_begin, key_end, rows, columns, mask_start)
        p = weights(q, k, largest, log_total, mask, settings, tile, by_keys, PRECISION)
        kept = dropout_factors(settings, seed, tile, QUERY_BLOCK, KEY_BLOCK, by_keys)
        z = dropped(p, kept, settings)
        to_value = tl.dot(z.to(g.dtype), g, to_value, input_precision=PRECISION)
        dp = dropped(product(g, v, None, by_keys, PRECISION), kept, settings)
        ds = p * (dp - d[None, :])
        to_key = tl.dot(ds.to(q.dtype), q, to_key, input_precision=PRECISION)

    store_tile(grad_key, batch, kv_head, first_key, n_keys, settings.scale * to_key, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    store_tile(grad_value, batch, kv_head, first_key, n_keys, to_value, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    *told: *Told,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention.

    Args: see the package; ``grad_out`` is the gradient of ``out``; ``out`` and ``statistics`` are what
        :func:`forward` returned.

    Returns:
        ``grad_query``, ``grad_key``, ``grad_value``, shaped and typed as ``query``, ``key``, ``value``.
    """
    problem = Problem(query, key, value, *told)
    grad_out, query, key, value, out = (problem.flatten(tensor) for tensor in (grad_out, query, key, value, out))
    grad_query, grad_key, grad_value = (empty_like(tensor) for tensor in (query, key, value))
    inputs = {"grad_out": matrix(grad_out), "query": matrix(query), "key": matrix(key), "value": matrix(value)}
    of_rows = {"statistics": statistics.contiguous(), "delta": problem.empty_statistic()}
    problem.launch(
        backward_query_kernel,
        problem.query_programs,
        **inputs,
        **of_rows,
        out=matrix(out),
        grad_query=matrix(grad_query),
    )
    problem.launch(
        backward_key_kernel,
        problem.key_programs,
        **inputs,
        **of_rows,
        grad_key=matrix(grad_key),
        grad_value=matrix(grad_value),
    )
    return problem.unflatten(grad_query), problem.unflatten(grad_key), problem.unflatten(grad_value)
