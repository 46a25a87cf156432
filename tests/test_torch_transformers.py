"""Torch's own Transformer modules under meta-learning, in both modes and as they are called, against the plain loop."""

from __future__ import annotations

import threading

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.testing import relative_error

pytestmark = [
    pytest.mark.usefixtures("fused_cpu"),
    # What torch says of a Transformer whose batch is not first.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]
TASKS, EXAMPLES, LENGTH, WIDTH = 3, 2, 5, 8
SETTINGS = {"dim_feedforward": 12, "dropout": 0.0}


@pytest.fixture(autouse=True)
def attention_that_the_plain_loop_differentiates_twice():
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Called(nn.Module):
    """A module of torch's and how it is called: on x ``[B, N, E]`` and which of it is padding ``[B, N]``."""

    def __init__(self, module, call, batch_first):
        super().__init__()
        self.module, self.call, self.batch_first = module, call, batch_first

    def forward(self, x, padding):
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.call(self.module, x, padding)
        return out if self.batch_first else out.transpose(0, 1)


def causal(kind=torch.float64):
    if kind == torch.bool:
        return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=kind)


def encoder(batch_first, norm_first=False):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, **SETTINGS, batch_first=batch_first, norm_first=norm_first)
    # Nested tensors are what torch takes by default where it can.
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)


def decoder(batch_first):
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, **SETTINGS, batch_first=batch_first), 2)


def both(batch_first):
    return nn.Transformer(WIDTH, 2, 1, 1, **SETTINGS, batch_first=batch_first)


def attention(batch_first):
    return nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)


PLAIN = {
    "layer": (lambda first: nn.TransformerEncoderLayer(WIDTH, 2, **SETTINGS, batch_first=first), lambda m, x, p: m(x)),
    "layer, padding": (
        lambda first: nn.TransformerEncoderLayer(WIDTH, 2, **SETTINGS, batch_first=first),
        lambda m, x, p: m(x, src_key_padding_mask=p),
    ),
    "encoder": (encoder, lambda m, x, p: m(x)),
    "encoder, norm first": (lambda first: encoder(first, True), lambda m, x, p: m(x)),
    "encoder, padding": (encoder, lambda m, x, p: m(x, src_key_padding_mask=p)),
    "encoder, mask and padding": (
        encoder,
        lambda m, x, p: m(x, mask=causal(torch.bool), src_key_padding_mask=p, is_causal=True),
    ),
    "decoder": (decoder, lambda m, x, p: m(x, x.flip(-1))),
    "decoder, padding": (
        decoder,
        lambda m, x, p: m(x, x.flip(-1), tgt_key_padding_mask=p, memory_key_padding_mask=p),
    ),
    "transformer": (both, lambda m, x, p: m(x, x.flip(-1), src_key_padding_mask=p, memory_key_padding_mask=p)),
    "attention": (attention, lambda m, x, p: m(x, x, x, need_weights=False)[0]),
    "attention, padding": (attention, lambda m, x, p: m(x, x, x, key_padding_mask=p, need_weights=False)[0]),
    "attention and weights": (attention, lambda m, x, p: m(x, x, x, key_padding_mask=p)[0]),
    "attention of others": (attention, lambda m, x, p: m(x, x.flip(-1), x.cos(), need_weights=False)[0]),
}
# Torch is not told that these masks are causal, and looks into them itself.
CAUSAL = {
    "encoder": (encoder, lambda m, x, p: m(x, mask=causal())),
    "encoder, padding": (encoder, lambda m, x, p: m(x, mask=causal(), src_key_padding_mask=p.double().mul(-1e4))),
    "encoder, boolean": (encoder, lambda m, x, p: m(x, mask=causal(torch.bool))),
    "encoder, another mask": (encoder, lambda m, x, p: m(x, mask=causal().mT.contiguous())),
    "decoder": (decoder, lambda m, x, p: m(x, x.flip(-1), tgt_mask=causal())),
    "transformer": (both, lambda m, x, p: m(x, x.flip(-1), src_mask=causal(), tgt_mask=causal())),
}


def called(cases, name, batch_first):
    make, call = cases[name]
    return Called(make(batch_first), call, batch_first).double()


def loss_fn(model, batch):
    x, padding, y = batch
    # What stands at padding is nobody's business: torch's nested tensors give zeros there.
    return (model(x, padding) - y).pow(2).masked_fill(padding.unsqueeze(-1), 0.0).mean()


def batch(generator):
    x, y = (torch.randn(TASKS, EXAMPLES, LENGTH, WIDTH, generator=generator, dtype=torch.float64) for _ in "xy")
    lengths = torch.randint(2, LENGTH + 1, (TASKS, EXAMPLES, 1), generator=generator)
    return x, torch.arange(LENGTH) >= lengths, y


def maml(model, **options):
    return metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.3), steps=2, **options)


def check_a_call_and_adapt(model, generator, **options):
    support, query = batch(generator), batch(generator)
    graphs = {"create_graph": options.get("order", 2) == 2}
    losses = plain_loop.query_losses(model, loss_fn, support, query, 2, 0.3, **graphs)
    gradients = plain_loop.gradients(losses.mean(), model.parameters())
    meta = maml(model, **options)
    for _ in range(2):
        loss, found = plain_loop.meta_gradients(meta, support, query)
        assert relative_error(loss, losses.mean()) < 1e-10
        assert plain_loop.distance(found, gradients) < 1e-9
    learners = meta.adapt(support)
    out = learners(*query[:2])
    for task in range(TASKS):
        adapted = plain_loop.adaptation(model, loss_fn, plain_loop.task(support, task), 2, 0.3, **graphs)[-1]
        assert plain_loop.distance([learners.params[name][task] for name in adapted], list(adapted.values())) < 1e-10
        expected = plain_loop.at(model, adapted)(*(leaf[task] for leaf in query[:2]))
        assert relative_error(out[task], expected) < 1e-10
    assert meta.task_losses._model._batching == options.get("task_batching", "auto")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PLAIN)
def test_every_module(name, training, batch_first, generator):
    model = called(PLAIN, name, batch_first).train(training)
    check_a_call_and_adapt(model, generator)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("encoder, padding", {"order": 1}),
        ("encoder, padding", {"task_batching": "loop"}),
        ("encoder, padding", {"capture": True}),
        ("transformer", {"order": 1}),
        ("transformer", {"checkpoint": True}),
        ("attention", {"capture": True}),
        ("decoder, padding", {"task_batching": "loop"}),
    ],
    ids=str,
)
def test_evaluation_in_every_way_of_running(name, options, generator):
    check_a_call_and_adapt(called(PLAIN, name, True).eval(), generator, **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks_that_nobody_named(name, training, generator):
    check_a_call_and_adapt(called(CAUSAL, name, True).train(training), generator)


@pytest.mark.parametrize("name", ["encoder", "encoder, another mask", "transformer"])
def test_causal_masks_that_nobody_named_are_recorded(name, generator):
    check_a_call_and_adapt(called(CAUSAL, name, True), generator, capture=True)


def test_a_mask_of_each_tasks_own(generator):
    """Torch cannot look into it under vmap."""
    model = encoder(True).double()
    masks = torch.randn(TASKS, LENGTH, LENGTH, generator=generator, dtype=torch.float64)
    masks[0] = causal()

    def loss(model, batch):
        return model(*batch).pow(2).mean()

    x = batch(generator)[0]
    meta = metafast.MAML(model, loss, inner=metafast.inner.SGD(lr=0.3), steps=1, task_batching="vmap")
    expected = plain_loop.query_losses(model, loss, (x, masks), (x, masks), 1, 0.3).mean()
    found = meta((x, masks), (x, masks))
    assert relative_error(found, expected) < 1e-12


def test_nothing_changes_for_others():
    """The inference path is off in this thread alone, and torch's setting is what it was."""
    model, seen = encoder(True), []

    def look():
        mask = causal(torch.float32)
        seen.append(
            (
                torch.backends.mha.get_fastpath_enabled(),
                nn.modules.transformer._detect_is_causal_mask(mask, None, LENGTH),
            )
        )

    names = torch.backends.mha.get_fastpath_enabled, nn.modules.transformer._detect_is_causal_mask
    with metafast.accelerate(model):
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.mha.set_fastpath_enabled(True)
    look()
    assert seen == [(False, False), (True, True), (True, True)]
    assert names == (torch.backends.mha.get_fastpath_enabled, nn.modules.transformer._detect_is_causal_mask)


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unsqueeze(-3).chunk(3, -1)
        return F.gelu(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("way", ["capture", "device"])
def test_a_mode_that_overrides_functions_leaves_ours_on(way, generator, monkeypatch):
    """What is recorded, and what runs inside ``with torch.device``, calls the ops by torch's names too."""
    calls = []
    kernels = metafast.ops.attention.autograd.attention
    monkeypatch.setattr(
        metafast.ops.attention.autograd, "attention", lambda *args: calls.append(None) or kernels(*args)
    )
    model, x = Direct().double(), batch(generator)[0]
    meta = metafast.MAML(
        model, lambda m, b: m(b).pow(2).mean(), inner=metafast.inner.SGD(lr=0.1), steps=1, capture=way == "capture"
    )
    if way == "capture":
        meta(x, x)
    else:
        with torch.device("cpu"):
            meta(x, x)
    # Before a recording there are an ordinary forward and a step that is measured.
    assert len(calls) == (4 if way == "capture" else 2)
