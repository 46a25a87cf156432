"""Hessian-vector products by the double-backward trick, and third derivatives, which fused attention has not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hvp, vhp
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.testing import relative_error

pytestmark = pytest.mark.usefixtures("fused_cpu")
RAISES = pytest.raises(NotImplementedError, match="differentiable twice")
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.4},
    "window": {"window_size": (2, 1)},
    "lower right": {"is_causal": True, "query_offset": 1},
    "key range": {"key_start": torch.tensor([1, 0]), "key_length": torch.tensor([4, 0])},
}


def drawn(generator, mask=False, tasks=()):
    shapes = [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)] + ([(4, 1, 6)] if mask else [])
    return tuple(torch.randn(*tasks, *s, generator=generator, dtype=torch.float64) for s in shapes)


def loss_of(backend, **options):
    def loss(query, key, value, attn_mask=None):
        torch.manual_seed(5)
        out = metafast.scaled_dot_product_attention(
            query, key, value, attn_mask, enable_gqa=True, backend=backend, **options
        )
        return out.sin().pow(2).sum()

    return loss


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("product", [hvp, vhp])
@pytest.mark.parametrize("name", OPTIONS)
def test_products(name, product, mask, create_graph, generator):
    x, v = drawn(generator, mask), drawn(generator, mask)
    found, expected = (
        product(loss_of(b, **OPTIONS[name]), x, v, create_graph=create_graph)[1] for b in ("fused", "reference")
    )
    close(found, expected)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("by", [("grad_out",), ("tangents",), ("tangents", "grad_out")])
def test_gradients_by_directions(by, mask, generator):
    """Of the double backward by its cotangents, and of those again, some of them or all."""
    results = []
    x, v = drawn(generator, mask), drawn(generator, mask)
    for backend in ("fused", "reference"):
        inputs = [y.clone().requires_grad_() for y in x]
        out = metafast.scaled_dot_product_attention(*inputs, enable_gqa=True, backend=backend)
        grad_out = torch.ones_like(out).cumsum(-2).requires_grad_()
        tangents = [y.clone().requires_grad_("tangents" in by) for y in v]
        first = torch.autograd.grad(out, inputs, grad_out, create_graph=True)
        second = torch.autograd.grad(first, [*inputs, grad_out], tangents, create_graph=True)
        wanted = tangents if "tangents" in by else []
        if "grad_out" in by:
            # Linear in grad_out too, but a derivative by what is saved.
            if backend == "fused":
                with RAISES:
                    torch.autograd.grad(sum(s.sin().sum() for s in second), [grad_out, *wanted])
            continue
        linear = torch.autograd.grad(sum(s.sin().sum() for s in second), wanted, create_graph=True)
        results.append([*linear, *torch.autograd.grad(sum(s.pow(2).sum() for s in linear), wanted)])
    if results:
        close(*results)


@pytest.mark.parametrize("by", range(4))
def test_third_derivatives_raise(by, generator):
    x, v = drawn(generator, True), drawn(generator, True)
    inputs = [y.requires_grad_() for y in x]
    loss = loss_of("fused")
    first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs, create_graph=True)
    with RAISES:
        torch.autograd.grad(second[0].pow(2).sum(), inputs[by], retain_graph=True)
    with RAISES:
        torch.autograd.grad(sum(s.sum() for s in second), inputs, allow_unused=True, retain_graph=True)
    with RAISES:
        second[0].sum().backward(retain_graph=True)
    # Not a leaf.
    others = [y * 1.0 for y in inputs]
    products = hvp(loss, tuple(others), v, create_graph=True)[1]
    with RAISES:
        torch.autograd.grad(sum(p.sum() for p in products), others[by], retain_graph=True)
    with RAISES:
        torch.autograd.grad(sum(p.sum() for p in products), inputs[by])
    third = torch.func.grad(lambda *y: hvp_by_functions(loss, y, v), by)
    with RAISES:
        third(*x)


def hvp_by_functions(loss, inputs, v):
    numbers = tuple(range(len(inputs)))
    product = torch.func.grad(
        lambda *y: sum((g * d).sum() for g, d in zip(torch.func.grad(loss, numbers)(*y), v, strict=True)), numbers
    )
    return sum(p.sum() for p in product(*inputs))


def test_products_for_many_directions(generator):
    x, v = drawn(generator), drawn(generator, tasks=(3,))
    results = []
    for backend in ("fused", "reference"):
        inputs = [y.clone().requires_grad_() for y in x]
        first = torch.autograd.grad(loss_of(backend)(*inputs), inputs, create_graph=True)
        directions = [torch.zeros_like(g).requires_grad_() for g in first]
        second = torch.autograd.grad(first, inputs, directions, create_graph=True)
        results.append(torch.autograd.grad(second, directions, v, is_grads_batched=True, retain_graph=True))
        results.append(vmap(lambda *v, s=second, d=directions: torch.autograd.grad(s, d, v, retain_graph=True))(*v))
    for found in results[1:]:
        close(found, results[0])


def test_tasks_side_by_side(generator):
    """The trick around a vmap over tasks."""
    x, v = drawn(generator, tasks=(3,)), drawn(generator, tasks=(3,))
    found, expected = (hvp(lambda *x, b=b: vmap(loss_of(b))(*x).sum(), x, v)[1] for b in ("fused", "reference"))
    close(found, expected)


def test_multihead_attention(generator):
    module = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    names, params = zip(*((n, p.detach()) for n, p in module.named_parameters()), strict=True)
    v = tuple(torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params)

    def loss(*params):
        out = functional_call(module, dict(zip(names, params, strict=True)), (x, x, x), {"need_weights": False})[0]
        return F.gelu(out).pow(2).sum()

    with sdpa_kernel(SDPBackend.MATH):
        expected = hvp(loss, params, v)[1]
    with metafast.accelerate(module):
        close(hvp(loss, params, v)[1], expected)
        close(vhp(loss, params, v)[1], expected)
        leaves = tuple(p.clone().requires_grad_() for p in params)
        products = hvp(loss, leaves, v, create_graph=True)[1]
        with RAISES:
            torch.autograd.grad(products[0].sum(), leaves)


def test_layers_on_top_of_each_other(generator):
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    names, params = zip(*((n, p.detach()) for n, p in module.named_parameters()), strict=True)
    v = tuple(torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params)

    def loss(*params):
        return functional_call(module, dict(zip(names, params, strict=True)), (x,)).sin().sum()

    with sdpa_kernel(SDPBackend.MATH):
        expected = hvp(loss, params, v)[1]
    with metafast.accelerate(module):
        found = hvp(loss, params, v)[1]
    scale = max(e.abs().max() for e in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-10 * scale
