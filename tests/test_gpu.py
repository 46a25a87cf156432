"""The stack on a GPU: the dispatcher finds the kernels, and whole derivations agree with the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

import metafast
from metafast.models import EncoderClassifier
from metafast.ops.attention.triton import tiles
from metafast.testing import ATTENTION_CASES, relative_error, second_order

pytestmark = pytest.mark.gpu


def attention(backend):
    return lambda *args, **options: metafast.scaled_dot_product_attention(*args, **options, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_attention_is_as_good_as_eager(case, dtype, generator):
    inputs = case.inputs(dtype, generator, "cuda")
    exact = second_order(attention("reference"), inputs.to(torch.float64))
    eager = second_order(attention("reference"), inputs)
    for name, value in second_order(attention("fused"), inputs).items():
        error, bar = relative_error(value, exact[name]), 2 * relative_error(eager[name], exact[name])
        assert error <= bar + 2 * torch.finfo(dtype).eps, name


def test_vmap_of_grad(generator):
    q, k, v = (torch.randn(3, 2, 2, 20, 16, generator=generator).cuda() for _ in range(3))
    found, expected = (
        vmap(grad(lambda *qkv, b=b: attention(b)(*qkv).pow(3).sum(), (0, 1, 2)))(q, k, v)
        for b in ("fused", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


def test_bitwise_deterministic(generator):
    inputs = ATTENTION_CASES[-1].inputs(torch.bfloat16, generator, "cuda")
    first, again = (second_order(attention("fused"), inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


def test_measured_configurations_give_the_same(generator, tmp_path, monkeypatch):
    """Whatever tiles are chosen, up to the order of sums; and the choices are kept on disk."""
    inputs = next(case for case in ATTENTION_CASES if case.name == "dropout and bias").inputs(
        torch.float32, generator, "cuda"
    )
    monkeypatch.setenv("METAFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("METAFAST_AUTOTUNE", "0")
    expected = second_order(attention("fused"), inputs)
    space = tiles.space
    monkeypatch.setattr(tiles, "space", lambda *arguments: space(*arguments)[:4])
    monkeypatch.setenv("METAFAST_AUTOTUNE", "1")
    for name, value in second_order(attention("fused"), inputs).items():
        assert relative_error(value, expected[name]) < 1e-5, name
    assert tiles.choices()


@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradient(order, generator):
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    support, query = (
        (
            torch.randint(1, 256, (3, n, 16), generator=generator).cuda(),
            torch.randint(0, 5, (3, n), generator=generator).cuda(),
        )
        for n in (4, 5)
    )
    model = EncoderClassifier(5, width=32, max_length=16).cuda()
    meta = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.1), steps=3, order=order)
    report = metafast.check(meta, support, query, backend="fused", rounds=1)
    assert report.error < 1e-4
    assert report.peak_bytes > 0


@pytest.mark.parametrize("order", [1, 2])
def test_a_captured_step_is_a_cuda_graph(order, generator):
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    model = EncoderClassifier(5, width=32, max_length=16).cuda()
    options = {"inner": metafast.inner.SGD(lr=0.1), "steps": 2, "order": order, "reduction": "sum"}
    graph, plain = (metafast.MAML(model, loss_fn, capture=on, **options) for on in (True, False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        support, query = (
            (torch.randint(1, 256, (4, 5, 16)).cuda(), torch.randint(0, 5, (4, 5)).cuda()) for _ in range(2)
        )
        found, expected = (
            torch.autograd.grad(meta(support, query), list(model.parameters())) for meta in (graph, plain)
        )
        for value, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        graph(support, query).backward()
        optimizer.step()
