"""The products of linear layers of several tasks against torch's batched ones, at the sizes of the suite ``meta_step``."""

from __future__ import annotations

import functools

import pytest
import torch

from metafast.backend import extension
from metafast.ops.layers.linear import linear

# Tasks, rows of a task, width. Layers are as wide, twice (feed-forward) and three times (query, key and value).
SIZES = {"S": (4, 320, 64), "M": (4, 640, 128), "L": (2, 1280, 256), "X": (2, 2048, 128)}


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("name", SIZES)
def test_products(name, factor, terms, measure, device, benchmark):
    """With a bias; two terms are what a double backward sends to the cotangent of a layer's result."""
    if device != "cpu" or extension() is None:
        pytest.skip("the kernel is the CPU's: elsewhere these are torch's products")
    tasks, rows, width = SIZES[name]
    columns = factor * width
    benchmark.group = f"{name}, {width} to {columns}, {terms} term{'s'[: terms - 1]}"
    torch.manual_seed(0)
    lefts = [torch.randn(tasks, rows, width) for _ in range(terms)]
    rights = [torch.randn(tasks, columns, width).mT for _ in range(terms)]
    bias, ours, theirs = torch.randn(tasks, 1, columns), *(torch.empty(tasks, rows, columns) for _ in range(2))

    def own():
        torch.ops.metafast.sum_of_products.out(bias, lefts, rights, out0=ours)

    def peer():
        torch.baddbmm(bias, lefts[0], rights[0], out=theirs)
        if terms == 2:
            torch.baddbmm(theirs, lefts[1], rights[1], out=theirs)

    own(), peer()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    measure("metafast", own, {"torch.baddbmm": peer}, rounds=40)


@pytest.mark.parametrize("name", SIZES)
def test_bfloat16(name, measure, device, benchmark):
    """A layer of one set of weights, forward and backward, under autocast."""
    tasks, rows, width = SIZES[name]
    benchmark.group = f"{name}, {width} to {width}, bfloat16"
    torch.manual_seed(0)
    x, cotangent = (torch.randn(tasks * rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((width, width), (width,)))

    def step(function):
        with torch.autocast(device, dtype=torch.bfloat16):
            out = function(x, weight, bias)
        return torch.autograd.grad(out, (weight, bias), cotangent)

    own, peer = (functools.partial(step, function) for function in (linear, torch.nn.functional.linear))
    torch.testing.assert_close(own(), peer(), rtol=2e-2, atol=2e-2 * rows**0.5)
    measure("metafast", own, {"torch": peer}, rounds=10)
