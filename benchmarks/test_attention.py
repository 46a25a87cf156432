"""Attention of first and second order against torch's math backend and its fused kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metafast import scaled_dot_product_attention
from metafast.testing import AttentionCase, relative_error, second_order

# (batch x heads, length, head dimension)
SHAPES = [(8, 32, 16), (512, 32, 16), (256, 64, 32), (128, 128, 32), (32, 512, 64), (16, 1024, 64), (8, 2048, 64)]


def fused(*args, **options):
    return scaled_dot_product_attention(*args, **options, backend="fused")


def math(*args, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


def first_order(function, inputs):
    qkv = [x.detach().requires_grad_() for x in inputs.qkv]
    return torch.autograd.grad(function(*qkv, **inputs.options), qkv, inputs.grad_out)


def draw(shape, device):
    heads, length, head_dim = shape
    case = AttentionCase("", length, length, head_dim, lead=(1,), heads=heads)
    return case.inputs(torch.float32, torch.Generator().manual_seed(0), device)


@pytest.mark.parametrize("backend", [fused, math])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_second_order(shape, backend, measure, device, benchmark):
    benchmark.group = f"attention, forward to double backward {shape}"
    inputs = draw(shape, device)
    expected = second_order(math, inputs)
    for name, value in second_order(backend, inputs).items():
        assert relative_error(value, expected[name]) < 1e-4, name
    if backend is math:
        return measure("math", lambda: second_order(math, inputs))
    return measure("fused", lambda: second_order(fused, inputs), "math", lambda: second_order(math, inputs))


@pytest.mark.parametrize("backend", [fused, F.scaled_dot_product_attention])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_first_order(shape, backend, measure, device, benchmark):
    benchmark.group = f"attention, forward and backward {shape}"
    inputs = draw(shape, device)
    for value, expected in zip(first_order(backend, inputs), first_order(math, inputs), strict=True):
        assert relative_error(value, expected) < 1e-4
    torchs = F.scaled_dot_product_attention
    if backend is torchs:
        return measure("torch", lambda: first_order(torchs, inputs))
    return measure("fused", lambda: first_order(fused, inputs), "torch", lambda: first_order(torchs, inputs))
