"""The check itself: it must see what is right and what is wrong, and leave everything as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metafast
from metafast.measure import peak_memory
from metafast.models import EncoderClassifier

pytestmark = pytest.mark.usefixtures("fused_cpu")


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def setting(generator):
    model = EncoderClassifier(classes=3, width=16, layers=1, heads=2, max_length=8)
    support, query = (
        (torch.randint(1, 256, (2, n, 8), generator=generator), torch.randint(0, 3, (2, n), generator=generator))
        for n in (4, 5)
    )
    return metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.1), steps=2), support, query


def test_report(setting, capfd):
    meta, support, query = setting
    before = [p.detach().clone() for p in meta.parameters()]
    report = metafast.check(meta, support, query, backend="fused", rounds=2)
    assert report.error < 1e-5
    assert 0 < report.reference_error < 1e-5
    assert set(report.errors) == {name for name, _ in meta.named_parameters()}
    assert abs(report.loss - report.exact_loss) < 1e-5
    assert report.seconds > 0
    assert report.peak_bytes > sum(p.numel() for p in meta.parameters()) * 4
    assert "meta-gradient: error" in str(report)
    # Torch's profilers write to it.
    assert capfd.readouterr().err == ""
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(meta.parameters(), before, strict=True))


def test_a_wrong_kernel_is_seen(setting, monkeypatch):
    from metafast.ops.attention import autograd

    meta, support, query = setting
    right = autograd.AttentionBackward.backward

    def wrong(ctx, *cotangents):
        grads = right(ctx, *cotangents)
        return grads[0], 1.1 * grads[1], *grads[2:]

    monkeypatch.setattr(autograd.AttentionBackward, "backward", staticmethod(wrong))
    assert metafast.check(meta, support, query, backend="fused", rounds=1).error > 1e-5


def test_reptile_without_query(setting):
    meta, support, _ = setting
    reptile = metafast.Reptile(meta.model, loss_fn, inner=metafast.inner.SGD(lr=0.1), steps=3)
    report = metafast.check(reptile, support, rounds=1)
    # A difference of almost equal parameters: how much of it is rounding depends on how far they moved.
    assert report.error <= 2 * report.reference_error < 1e-3


def test_gradients_that_softmax_cancels(generator):
    """Of a bias of the keys the exact gradient is 0, and what is found is rounding."""

    def loss(model, batch):
        key, value = model["key"](batch), model["value"](batch)
        return F.scaled_dot_product_attention(batch, key, value).square().mean()

    model = nn.ModuleDict({"key": nn.Linear(4, 4), "value": nn.Linear(4, 2)})
    support, query = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2))
    meta = metafast.MAML(model, loss, inner=metafast.inner.SGD(lr=0.1), steps=1)
    report = metafast.check(meta, support, query, rounds=1)
    assert report.max_error < 1e-4
    assert "model.key.bias" in report.errors
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        metafast.check(meta, support, query, rounds=0)


def test_bad_meta():
    with pytest.raises(TypeError, match=r"meta: expected a metafast algorithm such as metafast.MAML, got Linear"):
        metafast.check(nn.Linear(1, 1), None)


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        a = torch.ones(1000)
        del a
        b = torch.ones(500)
        return b, torch.ones(700)

    assert 4800 <= peak_memory(call) <= 4800 + 1024
