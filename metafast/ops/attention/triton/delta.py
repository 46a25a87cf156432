# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton types the parameters of kernels itself, and an annotation other than constexpr would say otherwise.
"""D = rowsum(dO * O) and its tangent, for passes that meet a block of queries more than once."""

import triton
import triton.language as tl
from torch import Tensor

from metafast.ops.attention.triton.common import load_tile, locate, store_statistic
from metafast.ops.attention.triton.launch import Problem, matrix

ROWS = 32


@triton.jit(do_not_specialize=["n_queries", "heads"])
def delta_kernel(
    grad_out,
    out,
    tangent_grad_out,
    tangent_out,
    delta,
    tangent_delta,
    n_queries,
    heads,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
):
    block, batch, head = locate(tl.cdiv(n_queries, QUERY_BLOCK), heads)
    first = block * QUERY_BLOCK
    g = load_tile(grad_out, batch, head, first, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK).to(tl.float32)
    o = load_tile(out, batch, head, first, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK).to(tl.float32)
    store_statistic(delta, batch, head, heads, first, n_queries, tl.sum(g * o, 1), QUERY_BLOCK)
    if tangent_out is not None:
        to = load_tile(tangent_out, batch, head, first, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
        products = g * to.to(tl.float32)
        if tangent_grad_out is not None:
            tg = load_tile(tangent_grad_out, batch, head, first, n_queries, QUERY_BLOCK, VALUE_DIM, VALUE_BLOCK)
            products += tg.to(tl.float32) * o
        store_statistic(tangent_delta, batch, head, heads, first, n_queries, tl.sum(products, 1), QUERY_BLOCK)


def deltas(
    problem: Problem,
    grad_out: Tensor,
    out: Tensor,
    tangent_grad_out: Tensor | None = None,
    tangent_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """D and, where there is a ``tangent_out``, its tangent: float32 ``[*lead, Hq, Nq]``.

    Args: shaped and typed as ``out``; ``tangent_grad_out`` None means zero.
    """
    delta = problem.empty_statistic()
    tangent_delta = None if tangent_out is None else problem.empty_statistic()
    problem.start(
        delta_kernel,
        problem.batches * problem.heads * triton.cdiv(problem.n_queries, ROWS),
        grad_out=matrix(problem.flatten(grad_out)),
        out=matrix(problem.flatten(out)),
        tangent_grad_out=None if tangent_grad_out is None else matrix(problem.flatten(tangent_grad_out)),
        tangent_out=None if tangent_out is None else matrix(problem.flatten(tangent_out)),
        delta=delta,
        tangent_delta=tangent_delta,
        n_queries=problem.n_queries,
        heads=problem.heads,
        VALUE_DIM=problem.value_dim,
        VALUE_BLOCK=problem.value_block,
        QUERY_BLOCK=ROWS,
        num_warps=4,
    )
    return delta, tangent_delta
