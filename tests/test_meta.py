"""MAML and Reptile against plain loops over tasks, in float64."""

from __future__ import annotations

import logging
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from held_memory import held_bytes
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast

pytestmark = pytest.mark.usefixtures("fused_cpu")
LR = 0.1


class Classifier(nn.Module):
    """A Transformer of torch's own parts, one parameter frozen, one tied, one that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x) * self.scale, src_key_padding_mask=x == 0).mean(1))


class Batch(NamedTuple):
    text: torch.Tensor
    label: torch.Tensor


def loss_fn(model, batch):
    return F.cross_entropy(model(batch.text), batch.label)


def draw(generator, tasks, shots):
    text = torch.randint(1, 11, (tasks, shots, 6), generator=generator)
    text[:, ::2, 4:] = 0
    return Batch(text, torch.randint(0, 5, (tasks, shots), generator=generator))


@pytest.fixture
def model(generator):
    return Classifier().double()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain_adapt(model, support, steps, create_graph, momentum=0.0):
    """The inner loop of one task as everybody writes it."""
    params, buffers = trained(model), {}
    for _ in range(steps):
        loss = loss_fn(lambda x, p=params: functional_call(model, p, (x,)), support)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph, materialize_grads=True)
        for (name, p), g in zip(list(params.items()), grads, strict=True):
            buffers[name] = g if name not in buffers else momentum * buffers[name] + g
            params[name] = p - LR * buffers[name]
    return params


def plain_maml(model, support, query, steps, order, momentum=0.0):
    losses = []
    with sdpa_kernel(SDPBackend.MATH):
        for t in range(len(support.text)):
            params = plain_adapt(model, Batch(*(x[t] for x in support)), steps, order == 2, momentum)
            losses.append(loss_fn(lambda x, p=params: functional_call(model, p, (x,)), Batch(*(x[t] for x in query))))
        loss = torch.stack(losses).mean()
        return loss, torch.autograd.grad(loss, list(trained(model).values()), materialize_grads=True)


def meta_gradient(meta, *batches):
    meta.zero_grad()
    loss = meta(*batches)
    loss.backward()
    return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in trained(meta.model).values()]


def distance(found, expected):
    """‖found − expected‖ / ‖expected‖ over all parameters."""
    squares = [
        sum(x.pow(2).sum() for x in xs) for xs in ([a - b for a, b in zip(found, expected, strict=True)], expected)
    ]
    return (squares[0] / squares[1]).sqrt().item()


@pytest.mark.parametrize("mode", ["vmap", "loop", "checkpoint", "reference"])
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("order", [1, 2])
def test_maml_is_the_plain_loop(model, generator, order, steps, mode):
    support, query = draw(generator, 3, 4), draw(generator, 3, 5)
    expected_loss, expected = plain_maml(model, support, query, steps, order)
    meta = metafast.MAML(
        model,
        loss_fn,
        inner=metafast.inner.SGD(lr=LR),
        steps=steps,
        order=order,
        checkpoint=mode == "checkpoint",
        task_batching="loop" if mode == "loop" else "vmap",
    )
    with metafast.use_backend("reference" if mode == "reference" else "fused"):
        loss, found = meta_gradient(meta, support, query)
    assert abs(loss - expected_loss) < 1e-12
    assert distance(found, expected) < 1e-9
    assert meta.outcome.support_losses.shape == (steps, 3)
    assert not meta.outcome.query_losses.requires_grad


@pytest.mark.parametrize("checkpoint", [False, True])
def test_momentum_carries_its_state_through_the_steps(model, generator, checkpoint):
    support, query = draw(generator, 2, 4), draw(generator, 2, 5)
    _, expected = plain_maml(model, support, query, 3, 2, momentum=0.9)
    rule = metafast.inner.SGD(lr=LR, momentum=0.9)
    _, found = meta_gradient(metafast.MAML(model, loss_fn, inner=rule, steps=3, checkpoint=checkpoint), support, query)
    assert distance(found, expected) < 1e-9


def test_accelerated_by_the_user_as_well(model, generator):
    support, query = draw(generator, 2, 4), draw(generator, 2, 5)
    meta = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=LR), steps=2)
    _, expected = meta_gradient(meta, support, query)
    with metafast.accelerate(model):
        _, found = meta_gradient(meta, support, query)
    assert distance(found, expected) == 0.0


def test_float32_is_close_to_float64(model, generator):
    support, query = draw(generator, 3, 4), draw(generator, 3, 5)
    _, expected = plain_maml(model, support, query, 3, 2)
    _, found = meta_gradient(
        metafast.MAML(model.float(), loss_fn, inner=metafast.inner.SGD(lr=LR), steps=3), support, query
    )
    assert distance([g.double() for g in found], expected) < 1e-4


@pytest.mark.parametrize("checkpoint", [False, True])
def test_dropout_is_replayed(generator, checkpoint):
    """The gradient is that of the loss that was computed: finite differences under the same seed agree."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)).double()
    support, query = (
        tuple(torch.randn(2, 5, n, generator=generator, dtype=torch.float64) for n in (3, 1)) for _ in "12"
    )
    meta = metafast.MAML(
        net,
        lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        inner=metafast.inner.SGD(lr=LR),
        steps=3,
        checkpoint=checkpoint,
    )

    def value():
        torch.manual_seed(5)
        return meta(support, query)

    value().backward()
    weight, direction = net[0].weight, torch.randn(4, 3, generator=generator, dtype=torch.float64)
    slope = (weight.grad * direction).sum()
    with torch.no_grad():
        weight += 1e-6 * direction
        above = value()
        weight -= 2e-6 * direction
        below = value()
    assert ((above - below) / 2e-6 - slope).abs() < 1e-6 * (1 + slope.abs())


def test_checkpointing_keeps_the_memory_of_one_step(generator):
    """Counted by what autograd keeps between forward and backward, not by the clock."""
    support, query = draw(generator, 2, 4), draw(generator, 2, 5)

    def kept(steps, checkpoint):
        torch.manual_seed(0)
        meta = metafast.MAML(Classifier(), loss_fn, inner=metafast.inner.SGD(lr=LR), steps=steps, checkpoint=checkpoint)
        return held_bytes(lambda: meta(support, query))

    parameters = 2 * sum(p.numel() for p in Classifier().parameters()) * 4
    assert kept(6, True) - kept(5, True) <= 1.5 * parameters
    assert kept(6, False) - kept(5, False) > 5 * parameters


def test_reptile_with_sgd_outside_is_its_formula(model, generator):
    support, epsilon = draw(generator, 3, 4), 0.3
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    with sdpa_kernel(SDPBackend.MATH):
        adapted = [plain_adapt(model, Batch(*(x[t] for x in support)), 4, False) for t in range(3)]
    meta = metafast.Reptile(model, loss_fn, inner=metafast.inner.SGD(lr=LR), steps=4)
    meta(support).backward()
    torch.optim.SGD(trained(model).values(), lr=epsilon).step()
    for name, p in trained(model).items():
        expected = before[name] + epsilon * (torch.stack([a[name] for a in adapted]).mean(0) - before[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_reptile_reports_the_query_loss_and_does_not_learn_from_it(model, generator):
    support, query, other = (draw(generator, 2, 4) for _ in range(3))
    meta = metafast.Reptile(model, loss_fn, inner=metafast.inner.SGD(lr=LR), steps=2)
    loss, grads = meta_gradient(meta, support, query)
    other_loss, other_grads = meta_gradient(meta, support, other)
    assert loss != other_loss
    assert distance(grads, other_grads) == 0.0
    learners = meta.adapt(support)
    expected = F.cross_entropy(learners(query.text).flatten(0, 1), query.label.flatten())
    torch.testing.assert_close(loss.detach(), expected)


def test_adapt(model, generator):
    support, query = draw(generator, 3, 4), draw(generator, 3, 5)
    meta = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=LR), steps=2)
    for steps in (0, 2, 7):
        learners = meta.adapt(support, steps=steps)
        out = learners(query.text)
        assert out.shape == (3, 5, 11)
        assert not out.requires_grad
        for t in range(3):
            params = plain_adapt(model, Batch(*(x[t] for x in support)), steps, False)
            with torch.no_grad():
                torch.testing.assert_close(out[t], functional_call(model, params, (query.text[t],)))
    assert torch.equal(meta.adapt(support)(query.text), meta.adapt(support, steps=2)(query.text))
    assert all(p.grad is None for p in model.parameters())


def test_metrics_come_without_a_graph(model, generator):
    def with_accuracy(net, batch):
        logits = net(batch.text)
        return F.cross_entropy(logits, batch.label), {"accuracy": (logits.argmax(-1) == batch.label).double().mean()}

    support, query = draw(generator, 3, 4), draw(generator, 3, 5)
    meta = metafast.MAML(model, with_accuracy, inner=metafast.inner.SGD(lr=LR), steps=1)
    meta(support, query).backward()
    accuracy = (meta.adapt(support)(query.text).argmax(-1) == query.label).double().mean(1)
    assert torch.equal(meta.outcome.metrics["accuracy"], accuracy)
    assert meta.outcome.query_losses.shape == (3,)


def test_a_model_that_vmap_cannot_take_runs_as_a_loop(generator, caplog):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x):
            out = self.linear(x)
            return out if out.sum() > 0 else -out  # data-dependent control flow

    batch = tuple(torch.randn(2, 5, n, generator=generator) for n in (3, 1))
    arguments = {"inner": metafast.inner.SGD(lr=LR), "steps": 2}

    def loss(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    meta = metafast.MAML(Branching(), loss, **arguments)
    with caplog.at_level(logging.WARNING, "metafast"):
        meta(batch, batch).backward()
        meta(batch, batch).backward()
    assert caplog.text.count("tasks run one after another") == 1
    assert "data-dependent" in caplog.text
    with pytest.raises(RuntimeError, match="data-dependent"):
        metafast.MAML(Branching(), loss, task_batching="vmap", **arguments)(batch, batch)


def test_deepcopy_is_independent(model, generator):
    import copy

    support, query = draw(generator, 2, 4), draw(generator, 2, 5)
    meta = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=LR), steps=1)
    other = copy.deepcopy(meta)
    other(support, query).backward()
    assert all(p.grad is None for p in model.parameters())
    assert other.model.head.weight.grad is not None


SGD = metafast.inner.SGD(lr=LR)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"loss_fn": 3}, TypeError, "loss_fn: expected a callable"),
        ({"inner": 0.1}, TypeError, "inner: expected a rule of metafast.inner, got float"),
        ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
        ({"steps": 1.5}, TypeError, "steps: expected an int, got float"),
        ({"order": 3}, ValueError, "order: expected 1 or 2, got 3"),
        ({"task_batching": "map"}, ValueError, "task_batching: expected one of 'auto', 'vmap', 'loop', got 'map'"),
        ({"model": nn.Identity()}, ValueError, "model: expected parameters that require a gradient"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        metafast.MAML(**{"model": nn.Linear(1, 1), "loss_fn": loss_fn, "inner": SGD, **arguments})


TASKS = torch.ones(2, 3, 1)


@pytest.mark.parametrize(
    ("support", "query", "error", "message"),
    [
        (TASKS, TASKS[:1], ValueError, "query: expected 2 tasks, as many as in support, got 1"),
        (TASKS[:0], TASKS[:0], ValueError, "support: expected at least one task, got an empty task batch"),
        (
            (TASKS, TASKS[:1]),
            TASKS,
            ValueError,
            r"support: expected the same number of tasks in every tensor, got \[1, 2\]",
        ),
        ((TASKS, "text"), TASKS, TypeError, "support: expected tensors whose first dimension is the task, got str"),
        (torch.tensor(1.0), TASKS, ValueError, "support: .* got a scalar tensor"),
        ((), TASKS, TypeError, "support: expected tensors .* got tuple without any"),
    ],
)
def test_bad_tasks(support, query, error, message):
    meta = metafast.MAML(nn.Linear(1, 1), lambda m, b: m(b).mean(), inner=SGD)
    with pytest.raises(error, match=message):
        meta(support, query)


@pytest.mark.parametrize("task_batching", ["auto", "vmap", "loop"])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda m, b: m(b), ValueError, r"loss_fn: expected a scalar, the mean loss of one task, got shape \(3, 1\)"),
        (lambda m, b: 1.0, TypeError, "loss_fn: expected a scalar tensor, .* got float"),
        (lambda m, b: (m(b).mean(), 2), TypeError, r"loss_fn: .* got \(Tensor, int\)"),
    ],
)
def test_bad_loss(loss, error, message, task_batching):
    meta = metafast.MAML(nn.Linear(1, 1), loss, inner=SGD, task_batching=task_batching)
    with pytest.raises(error, match=message):
        meta(TASKS, TASKS)


def test_losses_that_are_not_finite_are_named():
    def loss(model, batch):
        return (model(batch) * batch).mean()

    bad = TASKS.clone()
    bad[1, 0, 0] = torch.inf
    meta = metafast.MAML(nn.Linear(1, 1), loss, inner=SGD, steps=2)
    with pytest.raises(
        FloatingPointError, match=r"support loss: expected finite values, got -?inf in task 1 at inner step 0"
    ):
        meta(bad, TASKS)
    with pytest.raises(FloatingPointError, match=r"query loss: .* in task 1 after the last inner step"):
        meta(TASKS, bad)
    with pytest.raises(FloatingPointError, match=r"in task 1 at inner step 0"):
        meta.adapt(bad)


def test_learners_want_as_many_tasks_as_were_adapted_to():
    learners = metafast.MAML(nn.Linear(1, 1), lambda m, b: m(b).mean(), inner=SGD).adapt(TASKS)
    with pytest.raises(ValueError, match="inputs: expected 2 tasks, as many as were adapted to, got 1"):
        learners(TASKS[:1])
