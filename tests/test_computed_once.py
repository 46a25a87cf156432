"""What no inner step changes is computed once, and nothing else: beside the same learner without it, in float64."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from plain_loop import meta_gradients
from torch import nn

import metafast
from metafast.inner import SGD

TASKS, SHOTS, STEPS = 3, 5, 3


def body(*middle):
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 6), nn.Tanh())


class Net(nn.Module):
    def __init__(self, *middle):
        super().__init__()
        self.body = body(*middle)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Attending(Net):
    def __init__(self):
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.head(self.attention(self.body(x).unsqueeze(1).expand(-1, 3, -1) * 1.0).mean(1))


class WrittenInPlace(Net):
    """Writes into what is known."""

    def forward(self, x):
        x = self.body[0](x)
        mask = torch.zeros(x.shape[-1], dtype=x.dtype)
        mask[1:] = 0.5
        x += mask
        x = x.relu_().mul(2.0)
        return self.head(x)


class Hooked(Net):
    """Halves a gradient that arrives at each step's own tensor."""

    def forward(self, x):
        x = self.body(x)
        if x.requires_grad:
            x.register_hook(lambda grad: grad / 2)
        return self.head(x.sin())


class Switching(Net):
    """The same functions with and without a graph."""

    def forward(self, x):
        with torch.no_grad():
            scale = self.body(x).abs().mean()
        return self.head(self.body(x) * scale + self.body(x).detach())


class HalfPrecise(Net):
    """The same functions of the same tensors inside of autocast and outside."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = self.body(x)
        return self.head(self.body(x) + 0.1 * rough.to(x.dtype))


class ReadsStatistics(Net):
    """Reads what its batch norm has written."""

    def forward(self, x):
        x = self.body(x)
        return self.head(x * (1 + self.body[1].running_var.sqrt()) + self.body[1].running_mean.tanh())


MODELS = {
    "plain": Net,
    "relu in place": lambda: Net(nn.ReLU(inplace=True)),
    "layer norm": lambda: Net(nn.LayerNorm(6), nn.GELU()),
    "dropout": lambda: Net(nn.Dropout(0.5)),
    "batch norm": lambda: Net(nn.BatchNorm1d(6)),
    "batch norm in evaluation": lambda: Net(nn.BatchNorm1d(6).eval()),
    "statistics that are read": lambda: ReadsStatistics(nn.BatchNorm1d(6, momentum=0.5)),
    "instance norm": lambda: Net(
        nn.Unflatten(-1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(-2)
    ),
    "attention": Attending,
    "written in place": WrittenInPlace,
    "hooked": Hooked,
    "switching": Switching,
}


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def draw(generator):
    def batch():
        return (
            torch.randn(TASKS, SHOTS, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (TASKS, SHOTS), generator=generator),
        )

    return batch


def learner(model, *, once=True, patterns=("head.*",), **options):
    meta = metafast.MAML(
        copy.deepcopy(model), loss_fn, inner=SGD(lr=0.3), steps=STEPS, adapt_parameters=patterns, **options
    )
    if not once:
        meta.computing_once = lambda *batches: contextlib.nullcontext()
    return meta


def compare(model, draw, taken=None, **options):
    """Both learners, two calls: losses, gradients, buffers, and adapted parameters."""
    metas = [learner(model, once=once, **options) for once in (True, False)]
    for _ in range(2):
        support, query = draw(), draw()
        found = []
        for meta in metas:
            torch.manual_seed(7)
            found.append((*meta_gradients(meta, support, query), list(meta.model.buffers())))
        torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)
        adapted = []
        for meta in metas:
            torch.manual_seed(7)
            adapted.append(meta.adapt(support).params)
        torch.testing.assert_close(*adapted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_the_same(draw, name, order):
    compare(MODELS[name]().double(), draw, order=order)


@pytest.mark.parametrize(
    "options",
    [
        {"task_batching": "loop"},
        {"tasks_per_chunk": 2},
        {"micro_batches": 2},
        {"capture": True},
        {"checkpoint": True},
        {"step_weights": [0.2, 0.3, 0.5]},
        {"patterns": ["body.2.*", "head.*"]},
        {"patterns": ["body.0.bias"]},
    ],
    ids=str,
)
def test_options(draw, options):
    compare(Net(nn.LayerNorm(6)).double(), draw, **options)


def test_a_loss_that_takes_gradients(draw):
    """It frees the graphs of its own step, which later ones may not share."""

    def penalised(model, batch):
        x, labels = batch
        features = model.body(x * 1.0)
        (slope,) = torch.autograd.grad(features.sum(), [model.body[0].weight], create_graph=True)
        return F.cross_entropy(model.head(features), labels) + slope.square().mean()

    model = Net().double()
    found = []
    for once in (True, False):
        meta = learner(model, once=once, task_batching="loop")
        meta.loss_fn = penalised
        meta.task_losses._model.module.loss_fn = penalised
        torch.manual_seed(0)
        found.append([])
        for seed in range(2):
            support, query = draw_with(seed), draw_with(seed + 10)
            found[-1].append(meta_gradients(meta, support, query))
    torch.testing.assert_close(*found)


def draw_with(seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(TASKS, SHOTS, 4, generator=generator, dtype=torch.float64),
        torch.randint(3, (TASKS, SHOTS), generator=generator),
    )


def test_autocast_is_another_call(generator):
    """In float32, which autocast takes."""
    batches = [
        (torch.randn(TASKS, SHOTS, 4, generator=generator), torch.randint(3, (TASKS, SHOTS), generator=generator))
        for _ in range(2)
    ]
    model = HalfPrecise()
    metas = [learner(model, once=once) for once in (True, False)]
    found = [meta_gradients(meta, *batches) for meta in metas]
    (loss, gradients), (expected, expected_gradients) = found
    assert torch.equal(loss, expected)
    assert torch.equal(metas[0].outcome.support_losses, metas[1].outcome.support_losses)
    # One backward pass through the body sums before bfloat16 rounds, several round before they are summed.
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-2, atol=1e-4)


def test_the_body_runs_once_for_all_steps(draw, caplog):
    meta = learner(Net().double())
    meta(draw(), draw())
    caplog.clear()
    with caplog.at_level("DEBUG", logger="metafast"):
        meta(draw(), draw()).backward()
    # Two layers and a tanh, at the second and third step.
    assert "linear (again 4 times)" in caplog.text
    assert "tanh (again 2 times)" in caplog.text


def test_a_graph_of_all_steps_is_gone_through_once(draw):
    """The meta-gradient's backward pass multiplies by the body's weights as often as one pass through it does."""
    products = {}
    for once in (True, False):
        meta = learner(Net().double(), once=once)
        meta(draw(), draw())
        total = meta(draw(), draw())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            total.backward()
        products[once] = sum(
            e.count
            for e in profile.key_averages()
            if e.key in ("aten::mm", "aten::bmm", "aten::baddbmm", "metafast::sum_of_products")
        )
    assert products[True] < products[False]


def test_nothing_is_kept_after_a_call(draw):
    from metafast import computed_once

    meta = learner(Net().double())
    for _ in range(2):
        meta(draw(), draw()).backward()
    assert computed_once._local.session is None
    assert computed_once._local.inside is None
