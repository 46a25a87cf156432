# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""Forward mode: tangents of the output and of the log-sum-exp L, one program a block of queries.

    P = softmax(S),  Ṡ = s (Q̇ K^T + Q K̇^T) + Ṁ,  mu = rowsum(P * Ṡ) = L̇,  Z = keep * P,  Ȯ = (Z * Ṡ) V + Z V̇ - mu O

where dropout's keep is 0 or 1 / (1 - its probability), and Ṁ the tangent of an additive mask.
This is also the gradient of the output's gradient in double backward, at the tangents (ggQ, ggK, ggV).
"""

import triton
import triton.language as tl
from torch import Tensor

from metafast.ops.attention.options import Told
from metafast.ops.attention.triton.common import (
    existing_keys,
    keys_of,
    load_tile,
    locate,
    mean_of_first_rows,
    store_statistic,
    store_tile,
)
from metafast.ops.attention.triton.launch import Problem, empty_like, matrix
from metafast.ops.attention.triton.scores import (
    Tile,
    add_tangent_mask,
    dropout_factors,
    dropped,
    load_softmax,
    mask_of,
    rows_and_columns,
    seed_of,
    tangent_scores,
    weights,
)


@triton.jit(do_not_specialize=["n_queries", "heads"])
def jvp_kernel(
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
    mu,
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
    largest, log_total = load_softmax(statistics, query, mask, batch, head, heads, first_query, n_queries, QUERY_BLOCK)

    # A number a row may be taken from Ṡ, since mu absorbs it: without the part that comes from the keys' common offset,
    # rounding P * Ṡ does not lose what remains. In the loop the mean over the first block is taken out too: next to mu O
    # the products with P * Ṡ would cancel, in rows that attend to few keys nearly all of them.
    offset = mean_of_first_rows(key, batch, kv_head, key_begin, key_end, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
    tangent_offset = mean_of_first_rows(
        tangent_key, batch, kv_head, key_begin, key_end, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK
    )
    common = tq.to(tl.float32) * offset[None, :] + q.to(tl.float32) * tangent_offset[None, :]
    common = settings.scale * tl.sum(common, 1)

    tangent = tl.zeros([QUERY_BLOCK, VALUE_BLOCK], dtype=tl.float32)
    mean = tl.zeros([QUERY_BLOCK], dtype=tl.float32)
    for first_key in range(start, end, KEY_BLOCK):
        k = load_tile(key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        tk = load_tile(tangent_key, batch, kv_head, first_key, n_keys, KEY_BLOCK, HEAD_DIM, HEAD_BLOCK)
        tile = Tile(head, first_query, first_key, n_queries, n_keys, key_begin, key_end, rows, columns, mask_start)
        p = weights(q, k, largest, log_total, mask, settings, tile, by_keys, PRECISION)
        ts = tangent_scores(q, k, tq, tk, common, settings.scale, by_keys, PRECISION)
        ts = add_tangent_mask(ts, tangent_mask, tangent_mask_start, tile)
        if first_key == start:
            seen = tl.sum(p, 1)
            centre = tl.sum(p * ts, 1) / tl.where(seen == 0.0, 1.0, seen)
            common += centre
            ts -= centre[:, None]
        pts = p * ts
        mean += tl.sum(pts, 1)
        kept = dropout_factors(settings, seed, tile, QUERY_BLOCK, KEY_BLOCK, by_keys)
        p, pts = dropped(p, kept, settings), dropped(pts, kept, settings)
        v = load_tile(value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        tv = load_tile(tangent_value, batch, kv_head, first_key, n_keys, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        tangent = tl.dot(pts.to(v.dtype), v, tangent, input_precision=PRECISION)
        tangent = tl.dot(p.to(tv.dtype), tv, tangent, input_precision=PRECISION)

    o = load_tile(out, batch, head, first_query, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    tangent -= mean[:, None] * o.to(tl.float32)
    store_tile(tangent_out, batch, head, first_query, n_queries, tangent, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
    # A row that may attend to nothing keeps a log-sum-exp of -inf, whose tangent is zero.
    mean = tl.where(largest == float("inf"), 0.0, mean + common)
    store_statistic(mu, batch, head, heads, first_query, n_queries, mean, QUERY_BLOCK)


def jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    tangent_mask: Tensor | None,
    *told: *Told,
) -> Tensor:
    """Jacobian–vector product of attention.

    Args: see the package; tangents are shaped and typed as what they are tangents of, ``out`` and ``statistics`` are what
        :func:`forward` returned.

    Returns:
        ``tangent_out``, shaped and typed as ``out``.
    """
    problem = Problem(query, key, value, *told)
    return jvp_and_mean(
        problem, query, key, value, out, statistics, tangent_query, tangent_key, tangent_value, tangent_mask
    )[0]


def jvp_and_mean(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    tangent_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`jvp`, and ``mu`` ``[*lead, Hq, Nq]``, float32: the tangent of the log-sum-exp, in natural units; zero for
    rows that may attend to nothing."""
    out = problem.flatten(out)
    tangent_out, mu = empty_like(out), problem.empty_statistic()
    problem.launch(
        jvp_kernel,
        problem.query_programs,
        query=matrix(problem.flatten(query)),
        key=matrix(problem.flatten(key)),
        value=matrix(problem.flatten(value)),
        out=matrix(out),
        statistics=statistics.contiguous(),
        tangent_query=matrix(problem.flatten(tangent_query)),
        tangent_key=matrix(problem.flatten(tangent_key)),
        tangent_value=matrix(problem.flatten(tangent_value)),
        tangent_mask=problem.describe_mask(tangent_mask),
        tangent_out=matrix(tangent_out),
        mu=mu,
    )
    return problem.unflatten(tangent_out), mu
