"""Attention as others compute it, all called ``peer(query, key, value, **options)`` with the options of ``prepared``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metafast import scaled_dot_product_attention
from metafast.testing import AttentionInputs


def ours(*args: Tensor, **options: Any) -> Tensor:
    return scaled_dot_product_attention(*args, **options, backend="fused")


def math(*args: Tensor, **options: Any) -> Tensor:
    """Eager attention, the only one of torch's kernels that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


def prepared(peer: str, inputs: AttentionInputs) -> tuple[Callable[..., Tensor], AttentionInputs]:
    """A peer's function and its inputs: what it needs instead of our options is made here, outside of what is timed."""
    if peer == "metafast":
        return ours, inputs
    if peer == "flex":
        return _flex(inputs), dataclasses.replace(inputs, options={})
    if peer == "jvp_flash":
        return _jvp_flash(inputs), dataclasses.replace(inputs, options={})
    if peer == "math in float32":
        inputs = inputs.to(torch.float32)
    options = dict(inputs.options)
    window, offset, *_ = (options.pop(name) for name in ("window_size", "query_offset", "key_start", "key_length"))
    if window is not None:
        options["attn_mask"] = within(window, offset, inputs)
    return F.scaled_dot_product_attention if peer == "torch" else math, dataclasses.replace(inputs, options=options)


def within(window: tuple[int, int], offset: int, inputs: AttentionInputs) -> Tensor:
    rows, columns, device = inputs.query.shape[-2], inputs.key.shape[-2], inputs.query.device
    distance = torch.arange(columns, device=device) - torch.arange(offset, offset + rows, device=device)[:, None]
    return (distance >= -window[0]) & (distance <= window[1])


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(inputs: AttentionInputs) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    length, device, options = inputs.query.shape[-2], inputs.query.device, inputs.options
    mask, window, score = options["attn_mask"], options["window_size"], None
    if mask is not None:

        def score(value: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return value + mask[head, row, column]

    def keep(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if window is not None:
            return (column >= row - window[0]) & (column <= row + window[1])
        return row >= column

    block_mask = None
    if window is not None or options["is_causal"]:
        block_mask = create_block_mask(keep, None, None, length, length, device=str(device))
    return functools.partial(_compiled_flex(), score_mod=score, block_mask=block_mask)


def _jvp_flash(inputs: AttentionInputs) -> Callable[..., Tensor]:
    """PyPI's jvp-flash-attention: Triton kernels for the forward mode."""
    if not inputs.query.is_cuda:
        pytest.skip("jvp_flash_attention needs a GPU")
    module = pytest.importorskip(
        "jvp_flash_attention.jvp_attention", reason="jvp-flash-attention is not installed (pip install it beside torch)"
    )
    return functools.partial(module.attention, causal=inputs.options["is_causal"])
