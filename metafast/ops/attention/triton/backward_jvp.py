# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""Forward over reverse: tangents of the three gradients, from a kernel over queries, then one over keys.

In the notation of the backward pass, with E = keep * dO V^T - D, Z = keep * P and a dot for tangents,

    Ḋ = rowsum(dO * Ȯ) + rowsum(dȮ * O),  T = s (Q̇ K^T + Q K̇^T) + Ṁ - mu,  F = keep * (dO V̇^T + dȮ V^T) - Ḋ
    dS = P * E,  dṠ = P * (T * E + F)
    dQ̇ = s (dṠ K + dS K̇),  dK̇ = s (dṠ^T Q + dS^T Q̇),  dV̇ = (Z * T)^T dO + Z^T dȮ

At the tangents (ggQ, ggK, ggV) and with dȮ = 0 these are the double-backward gradients of Q, K and V; dȮ = gO adds the
ordinary backward pass of a gradient gO of the output.
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
from metafast.ops.attention.triton.jvp import jvp_and_mean
from metafast.ops.attention.triton.launch import Problem, empty_like, matrix
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


@triton.jit(do_not_specialize=["n_queries", "heads"])
def backward_jvp_query_kernel(
    grad_out,
    query,
    key,
    value,
    out,
    statistics,
    tangent_query,
    tangent_key,
    tangent_value,
    tangent_mask,
    tangent_out,
    tangent_grad_out,
    mu,
    delta,
    tangent_delta,
    tangent_grad_query,
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
    tangent_mask_start = mask_of(tangent_mask, batch)
    seed = seed_of(settings, batch)
    rows, columns = rows_and_columns(QUERY_BLOCK, KEY_BLOCK, by_keys)
    key_begin, key_end = existing_keys(settings, batch, n_keys)
    start, end = keys_of(settings, first_query, key_begin, key_end, QUERY_BLOCK, KEY_BLOCK)

    q = load_tile(query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    tq = load_tile(tangent_query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    g = load_tile(grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    o = load_tile(out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    to = load_tile(tangent_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    td = tl.sum(g.to(tl.float32) * to.to(tl.float32), 1)
    if tangent_grad_out is not None:
        tg = load_tile(tangent_grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        td += tl.sum(tg.to(tl.float32) * o.to(tl.float32), 1)
    if q.dtype != tl.float32:
        store_statistic(delta, batch, head, heads, first_query, n_queries, d, QUERY_BLOCK)
        store_statistic(tangent_delta, batch, head, heads, first_query, n_queries, td, QUERY_BLOCK)
    largest, log_total = load_softmax(statistics, query, mask, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
    mean = load_statistic(mu, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
    gradient = tl.zeros([QUERY_BLOCK, HEAD_BLOCK], dtype=tl.float32)
    excess = tl.zeros([QUERY_BLOCK], dtype=tl.float32)
    tangent_excess = tl.zeros([QUERY_BLOCK], dtype=tl.float32)
    for first_key in range(start, end, KEY_BLOCK):
        k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        tk = load_tile(tangent_key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        tv = load_tile(tangent_value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        tile = Tile(head, first_query, first_key, n_queries, n_keys, key_begin, key_end, rows, columns, mask_start)
        p = weights(q, k, largest, log_total, mask, settings, tile, by_keys, PRECISION)
        t = tangent_scores(q, k, tq, tk, mean, settings.scale, by_keys, PRECISION)
        t = add_tangent_mask(t, tangent_mask, tangent_mask_start, tile)
        e = product(g, v, None, by_keys, PRECISION)
        f = product(g, tv, None, by_keys, PRECISION)
        if tangent_grad_out is not None:
            f = product(tg, v, f, by_keys, PRECISION)
        kept = dropout_factors(settings, seed, tile, QUERY_BLOCK, KEY_BLOCK, by_keys)
        e, f = dropped(e, kept, settings), dropped(f, kept, settings)
        e -= d[:, None]
        ds = (p * e).to(k.dtype)
        tds = (p * (t * e + f - td[:, None])).to(k.dtype)
        gradient = tl.dot(tds, k, gradient, input_precision=PRECISION)
        gradient = tl.dot(ds, tk, gradient, input_precision=PRECISION)
        excess += tl.sum(ds.to(tl.float32), 1)
        tangent_excess += tl.sum(tds.to(tl.float32), 1)

    # As in the backward pass: rows of dS and dṠ sum to zero, and what rounding leaves is taken out.
    offset = mean_of_first_rows(key, batch, kv_head, key_begin, key_end, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    tangent_offset = mean_of_first_rows(
        tangent_key, batch, kv_head, key_begin, key_end, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK
    )
    gradient -= tangent_excess[:, None] * offset[None, :] + excess[:, None] * tangent_offset[None, :]
    store_tile(
        tangent_grad_query,
        batch,
        head,
        first_query,
        n_queries,
        settings.scale * gradient,
        QUERY_BLOCK,
        HEAD_DIM,
        HEAD_BLOCK,
    )
    if q.dtype == tl.float32:
        store_statistic(delta, batch, head, heads, first_query, n_queries, d + excess, QUERY_BLOCK)
        store_statistic(tangent_delta, batch, head, heads, first_query, n_queries, td + tangent_excess, QUERY_BLOCK)


@triton.jit(do_not_specialize=["n_queries", "heads"])
def backward_jvp_key_kernel(
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
    tangent_grad_key,
    tangent_grad_value,
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
    tangent_mask_start = mask_of(tangent_mask, batch)
    seed = seed_of(settings, batch)
    # One loop over the query blocks of all heads of the group; two nested ones cost more registers.
    key_begin, key_end = existing_keys(settings, batch, n_keys)
    first_block, n_blocks = query_blocks_of(settings, first_key, key_begin, key_end, n_queries, QUERY_BLOCK, KEY_BLOCK)

    k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    tk = load_tile(tangent_key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    tv = load_tile(tangent_value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    to_key = tl.zeros([KEY_BLOCK, HEAD_BLOCK], dtype=tl.float32)
    to_value = tl.zeros([KEY_BLOCK, VALUE_BLOCK], dtype=tl.float32)
    for index in range(0, group * n_blocks):
        head = kv_head * group + index // n_blocks
        first_query = (first_block + index % n_blocks) * QUERY_BLOCK
        q = load_tile(query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        tq = load_tile(tangent_query, batch, head, first_query, n_queries, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        g = load_tile(grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        largest, log_total = load_softmax(
            statistics, query, mask, batch, head, heads, first_query, n_queries, QUERY_BLOCK
        )
        mean = load_statistic(mu, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        d = load_statistic(delta, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        td = load_statistic(tangent_delta, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        tile = Tile(head, first_query, first_key, n_queries, n_keys, key_begin, key_end, rows, columns, mask_start)
        p = weights(q, k, largest, log_total, mask, settings, tile, by_keys, PRECISION)
        t = tangent_scores(q, k, tq, tk, mean, settings.scale, by_keys, PRECISION)
        t = add_tangent_mask(t, tangent_mask, tangent_mask_start, tile)
        kept = dropout_factors(settings, seed, tile, QUERY_BLOCK, KEY_BLOCK, by_keys)
        z = dropped(p, kept, settings)
        to_value = tl.dot((z * t).to(g.dtype), g, to_value, input_precision=PRECISION)
        e = product(g, v, None, by_keys, PRECISION)
        f = product(g, tv, None, by_keys, PRECISION)
        if tangent_grad_out is not None:
            tg = load_tile(tangent_grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
            f = product(tg, v, f, by_keys, PRECISION)
            to_value = tl.dot(z.to(tg.dtype), tg, to_value, input_precision=PRECISION)
        e, f = dropped(e, kept, settings), dropped(f, kept, settings)
        e -= d[None, :]
        tds = p * (t * e + f - td[None, :])
        to_key = tl.dot(tds.to(q.dtype), q, to_key, input_precision=PRECISION)
        to_key = tl.dot((p * e).to(q.dtype), tq, to_key, input_precision=PRECISION)

    store_tile(
        tangent_grad_key, batch, kv_head, first_key, n_keys, settings.scale * to_key, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK
    )
    store_tile(tangent_grad_value, batch, kv_head, first_key, n_keys, to_value, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)


def backward_jvp(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Jacobian–vector product of the pair (attention, its backward pass).

    Args: see the package; tangents are shaped and typed as what they are tangents of, ``out`` and ``statistics`` are what
        :func:`forward` returned. ``tangent_mask`` is shaped like an additive mask, though not necessarily like this one;
        it and ``tangent_grad_out`` may be None for zero.

    Returns:
        ``tangent_out``, ``tangent_grad_query``, ``tangent_grad_key``, ``tangent_grad_value``, shaped and typed as
        ``out``, ``query``, ``key``, ``value``.
    """
    problem = Problem(query, key, value, *told)
    tangent_out, mu = jvp_and_mean(
        problem, query, key, value, out, statistics, tangent_query, tangent_key, tangent_value, tangent_mask
    )
    query, key, value = (problem.flatten(tensor) for tensor in (query, key, value))
    grad_query, grad_key, grad_value = (empty_like(tensor) for tensor in (query, key, value))
    inputs = {
        "grad_out": matrix(problem.flatten(grad_out)),
        "query": matrix(query),
        "key": matrix(key),
        "value": matrix(value),
        "tangent_query": matrix(problem.flatten(tangent_query)),
        "tangent_key": matrix(problem.flatten(tangent_key)),
        "tangent_value": matrix(problem.flatten(tangent_value)),
        "tangent_mask": problem.describe_mask(tangent_mask),
        "tangent_grad_out": None if tangent_grad_out is None else matrix(problem.flatten(tangent_grad_out)),
        "statistics": statistics.contiguous(),
        "mu": mu,
        "delta": problem.empty_statistic(),
        "tangent_delta": problem.empty_statistic(),
    }
    problem.launch(
        backward_jvp_query_kernel,
        problem.query_programs,
        **inputs,
        out=matrix(problem.flatten(out)),
        tangent_out=matrix(problem.flatten(tangent_out)),
        tangent_grad_query=matrix(grad_query),
    )
    problem.launch(
        backward_jvp_key_kernel,
        problem.key_programs,
        **inputs,
        tangent_grad_key=matrix(grad_key),
        tangent_grad_value=matrix(grad_value),
    )
    return (
        tangent_out,
        problem.unflatten(grad_query),
        problem.unflatten(grad_key),
        problem.unflatten(grad_value),
    )
