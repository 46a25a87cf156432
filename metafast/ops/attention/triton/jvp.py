# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""Forward mode: tangents of the output and of the log-sum-exp, one program a block of queries.

    P = exp(S - L),  Ṡ = s (Q̇ K^T + Q K̇^T),  mu = rowsum(P * Ṡ) = L̇,  Ȯ = (P * Ṡ) V + P V̇ - mu O

This is also the gradient of the output's gradient in double backward, at the tangents (ggQ, ggK, ggV).
"""

import triton
import triton.language as tl
from torch import Tensor

from metafast.ops.attention.triton.common import (
    LOG2E,
    load_normaliser,
    load_tile,
    locate,
    mask_of,
    mask_scores,
    mean_of_first_rows,
    store_statistic,
    store_tile,
)
from metafast.ops.attention.triton.launch import Problem, empty_like, matrix


@triton.jit(do_not_specialize=["n_queries", "heads"])
def jvp_kernel(
    query,
    key,
    value,
    out,
    lse,
    tangent_query,
    tangent_key,
    tangent_value,
    tangent_out,
    mu,
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
    normaliser = load_normaliser(lse, batch, head, heads, first_query, n_queries, QUERY_BLOCK)

    # A number a row may be taken from Ṡ, since mu absorbs it: without the part that comes from the keys' common offset,
    # rounding P * Ṡ does not lose what remains.
    offset = mean_of_first_rows(key, batch, kv_head, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    tangent_offset = mean_of_first_rows(tangent_key, batch, kv_head, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    common = tq.to(tl.float32) * offset[None, :] + q.to(tl.float32) * tangent_offset[None, :]
    common = scale * tl.sum(common, 1)

    tangent = tl.zeros([QUERY_BLOCK, VALUE_BLOCK], dtype=tl.float32)
    mean = tl.zeros([QUERY_BLOCK], dtype=tl.float32)
    for first_key in range(0, end, KEY_BLOCK):
        k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        tk = load_tile(tangent_key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s = mask_scores(
            s, mask, mask_start, head, rows, columns, first_query, first_key, n_queries, n_keys, MASK, CAUSAL
        )
        p = tl.exp2(s - normaliser[:, None])
        ts = tl.dot(tq, tl.trans(k), input_precision=PRECISION)
        ts = tl.dot(q, tl.trans(tk), ts, input_precision=PRECISION)
        pts = p * (ts * scale - common[:, None])
        mean += tl.sum(pts, 1)
        v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        tv = load_tile(tangent_value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        tangent = tl.dot(pts.to(v.dtype), v, tangent, input_precision=PRECISION)
        tangent = tl.dot(p.to(tv.dtype), tv, tangent, input_precision=PRECISION)

    o = load_tile(out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    tangent -= mean[:, None] * o.to(tl.float32)
    store_tile(tangent_out, batch, head, first_query, n_queries, tangent, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    # A row that may attend to nothing keeps a normaliser of -inf, whose tangent is zero.
    mean = tl.where(normaliser == float("inf"), 0.0, mean + common)
    store_statistic(mu, batch, head, heads, first_query, n_queries, mean, QUERY_BLOCK)


def jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Jacobian–vector product of attention.

    Args: see the package; tangents are shaped and typed as what they are tangents of, ``out`` and ``lse`` are what
        :func:`forward` returned.

    Returns:
        ``tangent_out``, shaped and typed as ``out``; ``mu`` ``[*lead, Hq, Nq]``, float32, the tangent of ``lse`` (zero
        for rows that may attend to nothing).
    """
    problem = Problem(query, key, value, attn_mask, is_causal, scale)
    out = problem.flatten(out)
    tangent_out, mu = empty_like(out), problem.empty_statistic()
    problem.launch(
        jvp_kernel,
        "queries",
        query=matrix(problem.flatten(query)),
        key=matrix(problem.flatten(key)),
        value=matrix(problem.flatten(value)),
        out=matrix(out),
        lse=lse.contiguous(),
        tangent_query=matrix(problem.flatten(tangent_query)),
        tangent_key=matrix(problem.flatten(tangent_key)),
        tangent_value=matrix(problem.flatten(tangent_value)),
        tangent_out=matrix(tangent_out),
        mu=mu,
    )
    return problem.unflatten(tangent_out), mu
