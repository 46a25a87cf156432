# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""Forward over reverse: tangents of the three gradients, from a kernel over queries, then one over keys.

In the notation of the backward pass, with E = dO V^T - D and a dot for tangents,

    Ḋ = rowsum(dO * Ȯ) + rowsum(dȮ * O),  T = s (Q̇ K^T + Q K̇^T) - mu,  F = dO V̇^T + dȮ V^T - Ḋ
    dS = P * E,  dṠ = P * (T * E + F),  Ṗ = P * T
    dQ̇ = s (dṠ K + dS K̇),  dK̇ = s (dṠ^T Q + dS^T Q̇),  dV̇ = Ṗ^T dO + P^T dȮ

At the tangents (ggQ, ggK, ggV) and with dȮ = 0 these are the double-backward gradients of Q, K and V; dȮ = gO adds the
ordinary backward pass of a gradient gO of the output.
"""

import triton
import triton.language as tl
from torch import Tensor

from metafast.ops.attention.triton.common import (
    LOG2E,
    load_normaliser,
    load_statistic,
    load_tile,
    locate,
    mask_of,
    mask_scores,
    mean_of_first_rows,
    store_statistic,
    store_tile,
)
from metafast.ops.attention.triton.jvp import jvp
from metafast.ops.attention.triton.launch import Problem, empty_like, matrix


@triton.jit(do_not_specialize=["n_queries", "heads"])
def backward_jvp_query_kernel(
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    tangent_query,
    tangent_key,
    tangent_value,
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
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, batch, head = locate(tl.cdiv(n_queries, QUERY_BLOCK), heads)
    kv_head = head // group
    first_query = block * QUERY_BLOCK
    mask_start = mask_of(mask, batch, MASK)
    rows = tl.arange(0, QUERY_BLOCK)[:, None]
    columns = tl.arange(0, KEY_BLOCK)[None, :]
    end = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, first_query + QUERY_BLOCK)

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
    store_statistic(delta, batch, head, heads, first_query, n_queries, d, QUERY_BLOCK)
    store_statistic(tangent_delta, batch, head, heads, first_query, n_queries, td, QUERY_BLOCK)
    normaliser = load_normaliser(lse, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
    mean = load_statistic(mu, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
    gradient = tl.zeros([QUERY_BLOCK, HEAD_BLOCK], dtype=tl.float32)
    excess = tl.zeros([QUERY_BLOCK], dtype=tl.float32)
    tangent_excess = tl.zeros([QUERY_BLOCK], dtype=tl.float32)
    for first_key in range(0, end, KEY_BLOCK):
        k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        tk = load_tile(tangent_key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        tv = load_tile(tangent_value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s = mask_scores(
            s, mask, mask_start, head, rows, columns, first_query, first_key, n_queries, n_keys, MASK, CAUSAL
        )
        p = tl.exp2(s - normaliser[:, None])
        t = tl.dot(tq, tl.trans(k), input_precision=PRECISION)
        t = tl.dot(q, tl.trans(tk), t, input_precision=PRECISION) * scale - mean[:, None]
        e = tl.dot(g, tl.trans(v), input_precision=PRECISION) - d[:, None]
        f = tl.dot(g, tl.trans(tv), input_precision=PRECISION)
        if tangent_grad_out is not None:
            f = tl.dot(tg, tl.trans(v), f, input_precision=PRECISION)
        ds = (p * e).to(k.dtype)
        tds = (p * (t * e + f - td[:, None])).to(k.dtype)
        gradient = tl.dot(tds, k, gradient, input_precision=PRECISION)
        gradient = tl.dot(ds, tk, gradient, input_precision=PRECISION)
        excess += tl.sum(ds.to(tl.float32), 1)
        tangent_excess += tl.sum(tds.to(tl.float32), 1)

    # As in the backward pass: rows of dS and dṠ sum to zero, and what rounding leaves is taken out.
    offset = mean_of_first_rows(key, batch, kv_head, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    tangent_offset = mean_of_first_rows(tangent_key, batch, kv_head, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    gradient -= tangent_excess[:, None] * offset[None, :] + excess[:, None] * tangent_offset[None, :]
    store_tile(
        tangent_grad_query, batch, head, first_query, n_queries, scale * gradient, QUERY_BLOCK, HEAD_DIM, HEAD_BLOCK
    )


@triton.jit(do_not_specialize=["n_queries", "heads"])
def backward_jvp_key_kernel(
    grad_out,
    query,
    key,
    value,
    lse,
    tangent_query,
    tangent_key,
    tangent_value,
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
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles are transposed, [KEY_BLOCK, QUERY_BLOCK], so that the left operands of the products are there as they are.
    block, batch, kv_head = locate(tl.cdiv(n_keys, KEY_BLOCK), heads // group)
    first_key = block * KEY_BLOCK
    rows = tl.arange(0, QUERY_BLOCK)[None, :]
    columns = tl.arange(0, KEY_BLOCK)[:, None]
    mask_start = mask_of(mask, batch, MASK)
    first_block = 0
    if CAUSAL:
        first_block = first_key // QUERY_BLOCK
    # One loop over the query blocks of all heads of the group; two nested ones cost more registers.
    n_blocks = tl.maximum(tl.cdiv(n_queries, QUERY_BLOCK) - first_block, 0)

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
        normaliser = load_normaliser(lse, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        mean = load_statistic(mu, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        d = load_statistic(delta, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        td = load_statistic(tangent_delta, batch, head, heads, first_query, n_queries, QUERY_BLOCK)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        s = mask_scores(
            s, mask, mask_start, head, rows, columns, first_query, first_key, n_queries, n_keys, MASK, CAUSAL
        )
        p = tl.exp2(s - normaliser[None, :])
        t = tl.dot(k, tl.trans(tq), input_precision=PRECISION)
        t = tl.dot(tk, tl.trans(q), t, input_precision=PRECISION) * scale - mean[None, :]
        to_value = tl.dot((p * t).to(g.dtype), g, to_value, input_precision=PRECISION)
        e = tl.dot(v, tl.trans(g), input_precision=PRECISION) - d[None, :]
        f = tl.dot(tv, tl.trans(g), input_precision=PRECISION)
        if tangent_grad_out is not None:
            tg = load_tile(tangent_grad_out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
            f = tl.dot(v, tl.trans(tg), f, input_precision=PRECISION)
            to_value = tl.dot(p.to(tg.dtype), tg, to_value, input_precision=PRECISION)
        tds = p * (t * e + f - td[None, :])
        to_key = tl.dot(tds.to(q.dtype), q, to_key, input_precision=PRECISION)
        to_key = tl.dot((p * e).to(q.dtype), tq, to_key, input_precision=PRECISION)

    store_tile(tangent_grad_key, batch, kv_head, first_key, n_keys, scale * to_key, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    store_tile(tangent_grad_value, batch, kv_head, first_key, n_keys, to_value, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)


def backward_jvp(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    tangent_grad_out: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Jacobian–vector product of the pair (attention, its backward pass).

    Args: see the package; tangents are shaped and typed as what they are tangents of, ``out`` and ``lse`` are what
        :func:`forward` returned. ``tangent_grad_out`` None means zero.

    Returns:
        ``tangent_out``, ``tangent_grad_query``, ``tangent_grad_key``, ``tangent_grad_value``, shaped and typed as
        ``out``, ``query``, ``key``, ``value``.
    """
    tangent_out, mu = jvp(
        query, key, value, out, lse, tangent_query, tangent_key, tangent_value, attn_mask, is_causal, scale
    )
    problem = Problem(query, key, value, attn_mask, is_causal, scale)
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
        "tangent_grad_out": None if tangent_grad_out is None else matrix(problem.flatten(tangent_grad_out)),
        "lse": lse.contiguous(),
        "mu": mu,
        "delta": problem.empty_statistic(),
        "tangent_delta": problem.empty_statistic(),
    }
    problem.launch(
        backward_jvp_query_kernel,
        "queries",
        **inputs,
        out=matrix(problem.flatten(out)),
        tangent_out=matrix(problem.flatten(tangent_out)),
        tangent_grad_query=matrix(grad_query),
    )
    problem.launch(
        backward_jvp_key_kernel,
        "keys",
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
