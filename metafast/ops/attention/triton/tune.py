"""``python -m metafast.ops.attention.triton.tune``: measures the configurations of usual shapes on this GPU, and keeps them.

Takes minutes a width and dtype; what is already known is not measured again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence

import torch

from metafast.ops.attention.options import NO_LIMIT, Options, Told
from metafast.ops.attention.triton import backward, backward_jvp, forward
from metafast.ops.attention.triton.tiles import choices

TOKENS = 16384  # in all batches and heads: enough work for every multiprocessor


def tune(dtypes: Iterable[torch.dtype], head_dims: Iterable[int], lengths: Iterable[int]) -> None:
    """Calls the ops with and without a causal mask, measuring what has no choice yet.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune: expected a CUDA device, found none")
    previous = os.environ.get("METAFAST_AUTOTUNE")
    os.environ["METAFAST_AUTOTUNE"] = "1"
    try:
        for dtype in dtypes:
            for head_dim in head_dims:
                for length in lengths:
                    for right in (NO_LIMIT, 0):
                        _call_ops(dtype, head_dim, length, right)
    finally:
        if previous is None:
            del os.environ["METAFAST_AUTOTUNE"]
        else:
            os.environ["METAFAST_AUTOTUNE"] = previous


def _call_ops(dtype: torch.dtype, head_dim: int, length: int, right: int) -> None:
    heads = max(16, 16 * TOKENS // length)
    query, key, value, grad_out = (torch.randn(1, heads, length, head_dim, device="cuda").to(dtype) for _ in range(4))
    told: Told = (None, None, None, Options(left=NO_LIMIT, right=right, dropout_p=0.0, scale=head_dim**-0.5))
    out, statistics = forward(query, key, value, *told)
    backward(grad_out, query, key, value, out, statistics, *told)
    backward_jvp(grad_out, query, key, value, out, statistics, query, key, value, None, None, *told)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the configurations of the attention kernels on this GPU.")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 8192])
    options = parser.parse_args(arguments)
    tune([getattr(torch, name) for name in options.dtypes], options.head_dims, options.lengths)
    print(f"choices are in {choices().path}")


if __name__ == "__main__":
    main()
