"""Learned rates, and the algorithms that are MAML with choices: against plain loops in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from plain_loop import adaptation, at, distance, gradients, meta_gradients, query_losses, task
from torch import nn

import metafast
from metafast.inner import SGD

STEPS, TASKS = 3, 3


class Net(nn.Module):
    """A smooth network with a body and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))


def loss_fn(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"])


@pytest.fixture
def net(generator):
    return Net().double()


@pytest.fixture
def batches(generator):
    def draw(shots):
        return {
            name: torch.randn(TASKS, shots, size, generator=generator, dtype=torch.float64)
            for name, size in (("x", 3), ("y", 2))
        }

    return draw(4), draw(5)


def scattered(meta, generator):
    """Moves every learned rate away from its neighbours, so that mixing them up shows."""
    with torch.no_grad():
        for p in meta.rates.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def rate(meta, granularity, step, name):
    """What the documentation says of each granularity, written out."""
    learned = meta.rates.lr
    names = [n for n, p in meta.model.named_parameters() if p.requires_grad]
    step = min(step, STEPS - 1)
    value = {
        "number": lambda: learned,
        "step": lambda: learned[step],
        "tensor": lambda: learned[names.index(name)],
        "tensor_step": lambda: learned[step, names.index(name)],
        "parameter": lambda: learned[name.replace(".", "/")],
        "parameter_step": lambda: learned[name.replace(".", "/")][step],
    }[granularity]()
    return value.exp() if meta.inner.learn_log else value


GRANULARITIES = ["number", "step", "tensor", "tensor_step", "parameter", "parameter_step"]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("learn_log", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_of_learned_rates(net, batches, generator, granularity, order, learn_log, checkpoint):
    rule = SGD(lr=0.1, learn={"lr": granularity}, learn_log=learn_log)
    meta = metafast.MAML(net, loss_fn, inner=rule, steps=STEPS, order=order, checkpoint=checkpoint)
    scattered(meta, generator)
    loss, found = meta_gradients(meta, *batches)
    expected_loss = query_losses(
        net,
        loss_fn,
        *batches,
        STEPS,
        lambda step, name: rate(meta, granularity, step, name),
        create_graph=order == 2,
    ).mean()
    assert abs(loss - expected_loss) < 1e-12
    expected = gradients(expected_loss, meta.parameters())
    assert distance(found, expected) < 1e-9
    rates = list(meta.rates.parameters())
    assert distance(found[-len(rates) :], expected[-len(rates) :]) < 1e-9
    assert all(g.abs().sum() > 0 for g in found[-len(rates) :])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_two_learned_rates_and_momentum(net, batches, generator, checkpoint):
    rule = SGD(lr=0.1, momentum=0.8, weight_decay=0.05, learn={"lr": "step", "weight_decay": "tensor"})
    meta = metafast.MAML(net, loss_fn, inner=rule, steps=STEPS, checkpoint=checkpoint)
    scattered(meta, generator)
    losses = []
    for index in range(TASKS):
        params, velocity = dict(net.named_parameters()), {}
        for step in range(STEPS):
            loss = loss_fn(at(net, params), task(batches[0], index))
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            for i, ((name, p), grad) in enumerate(zip(list(params.items()), grads, strict=True)):
                decayed = grad + meta.rates.weight_decay[i] * p
                velocity[name] = decayed if step == 0 else 0.8 * velocity[name] + decayed
                params[name] = p - meta.rates.lr[step] * velocity[name]
        losses.append(loss_fn(at(net, params), task(batches[1], index)))
    _, found = meta_gradients(meta, *batches)
    assert distance(found, gradients(torch.stack(losses).mean(), meta.parameters())) < 1e-9


@pytest.mark.parametrize("granularity", ["step", "tensor_step", "parameter_step"])
def test_more_steps_than_in_training_use_the_last_rate(net, batches, generator, granularity):
    meta = metafast.MAML(net, loss_fn, inner=SGD(lr=0.1, learn={"lr": granularity}), steps=STEPS)
    scattered(meta, generator)
    support, _ = batches
    learners = meta.adapt(support, steps=5)
    for index in range(TASKS):
        expected = adaptation(
            net, loss_fn, task(support, index), 5, lambda step, name: rate(meta, granularity, step, name)
        )[-1]
        for name, value in expected.items():
            torch.testing.assert_close(learners.params[name][index], value.detach(), rtol=1e-12, atol=1e-14)
    assert not any(p.requires_grad for p in learners.params.values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_parameters_and_state_dict_carry_the_rates(net, batches, generator, granularity):
    def learner(model):
        return metafast.MAML(model, loss_fn, inner=SGD(lr=0.1, learn={"lr": granularity}), steps=STEPS)

    def train(meta, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            meta(*batches).backward()
            optimizer.step()

    meta = learner(copy.deepcopy(net))
    names = dict(meta.named_parameters())
    assert {n for n in names if n.startswith("model.")} == {f"model.{n}" for n, _ in net.named_parameters()}
    assert any(n.startswith("rates.lr") for n in names)
    optimizer = torch.optim.Adam(meta.parameters(), 0.01)
    train(meta, optimizer, 3)
    saved = copy.deepcopy((meta.state_dict(), optimizer.state_dict()))
    train(meta, optimizer, 3)

    resumed = learner(copy.deepcopy(net))
    resumed_optimizer = torch.optim.Adam(resumed.parameters(), 0.01)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    train(resumed, resumed_optimizer, 3)
    for name, p in resumed.named_parameters():
        assert torch.equal(p, dict(meta.named_parameters())[name]), name


def test_rates_start_at_the_rule_and_stay_in_float32_beside_half_precision():
    rule = SGD(lr=0.25, learn={"lr": "tensor_step"}, learn_log=True)
    meta = metafast.MAML(Net().bfloat16(), loss_fn, inner=rule, steps=2)
    assert meta.rates.lr.dtype == torch.float32
    assert meta.rates.lr.shape == (2, 6)
    torch.testing.assert_close(meta.rates.lr, torch.full((2, 6), math.log(0.25)))
    torch.testing.assert_close(meta.rates(0)["lr"]["head.bias"], torch.tensor(0.25))


def test_rates_of_a_model_in_half_precision_get_gradients(net, batches):
    exact = metafast.MAML(net, loss_fn, inner=SGD(lr=0.1, learn={"lr": "tensor"}), steps=2)
    _, expected = meta_gradients(exact, *batches)
    half = copy.deepcopy(net).bfloat16()
    meta = metafast.MAML(half, loss_fn, inner=SGD(lr=0.1, learn={"lr": "tensor"}), steps=2, checkpoint=True)
    _, found = meta_gradients(meta, *({name: x.bfloat16() for name, x in batch.items()} for batch in batches))
    assert found[-1].dtype == torch.float32
    assert distance([g.double() for g in found], expected) < 0.05


def test_check_covers_the_rates(net, batches):
    meta = metafast.MetaSGD(net, loss_fn, inner=SGD(lr=0.1), steps=2)
    report = metafast.check(meta, *batches, rounds=1)
    assert report.max_error < 1e-12
    assert "rates.lr.head/weight" in report.errors


def test_reptile_refuses_learned_rates(net):
    with pytest.raises(ValueError, match=r"inner: Reptile has no gradient for rates; expected none in learn, got .*lr"):
        metafast.Reptile(net, loss_fn, inner=SGD(lr=0.1, learn="lr"))


# --- Meta-SGD -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
def test_meta_sgd(net, batches, generator, checkpoint):
    meta = metafast.MetaSGD(net, loss_fn, inner=SGD(lr=0.05), steps=2, checkpoint=checkpoint)
    for alpha in meta.rates.parameters():
        nn.init.uniform_(alpha, 0.005, 0.1)
    loss = query_losses(net, loss_fn, *batches, 2, lambda _, name: meta.rates.lr[name.replace(".", "/")]).mean()
    _, found = meta_gradients(meta, *batches)
    assert distance(found, gradients(loss, meta.parameters())) < 1e-9
    assert sum(p.numel() for p in meta.rates.parameters()) == sum(p.numel() for p in net.parameters())


# --- ANIL, and any other choice of parameters -----------------------------------------------------------------------


@pytest.mark.parametrize("task_batching", ["vmap", "loop"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_anil(net, batches, order, checkpoint, task_batching):
    meta = metafast.ANIL(
        net,
        loss_fn,
        head="head.*",
        inner=SGD(lr=0.2),
        steps=STEPS,
        order=order,
        checkpoint=checkpoint,
        task_batching=task_batching,
    )
    loss = query_losses(
        net, loss_fn, *batches, STEPS, 0.2, names=["head.weight", "head.bias"], create_graph=order == 2
    ).mean()
    found_loss, found = meta_gradients(meta, *batches)
    assert abs(found_loss - loss) < 1e-12
    assert distance(found, gradients(loss, meta.parameters())) < 1e-9
    assert set(meta.adapt(batches[0]).params) == {"head.weight", "head.bias"}
    outputs = meta.adapt(batches[0])(batches[1]["x"])
    assert not outputs.requires_grad
    for index in range(TASKS):
        params = adaptation(net, loss_fn, task(batches[0], index), STEPS, 0.2, names=["head.weight", "head.bias"])[-1]
        torch.testing.assert_close(outputs[index], at(net, params)(batches[1]["x"][index]).detach())


def test_what_is_not_adapted_has_no_task_dimension(net, batches):
    """The body sees the shared weights, once, and the inner loop's gradients do not pass through it."""
    batched, backwards = [], []

    class Spy(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            backwards.append(grad)
            return grad

    class Spied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(net.body[0].weight.detach().clone())

        def forward(self, x):
            batched.append(torch._C._functorch.is_batchedtensor(self.weight))
            return F.linear(x, Spy.apply(self.weight))

    net.body[0] = Spied()
    arguments = {"inner": SGD(lr=0.2), "steps": 2, "order": 1, "task_batching": "vmap"}
    metafast.ANIL(net, loss_fn, head="head.*", **arguments)(*batches).backward()
    assert batched == [False] * 3
    assert len(backwards) == 1  # the meta-gradient's own
    metafast.MAML(net, loss_fn, **arguments)(*batches).backward()
    assert batched[3:] == [True] * 3
    assert len(backwards[1:]) == 3


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ("*.bias", ["body.0.bias", "body.2.bias", "head.bias"]),
        (["head.weight", "body.2.*"], ["body.2.weight", "body.2.bias", "head.weight"]),
        (lambda name, p: p.ndim == 2, ["body.0.weight", "body.2.weight", "head.weight"]),
    ],
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_parameters_chosen_by_pattern_or_predicate(net, batches, selection, names, checkpoint):
    arguments = {"inner": SGD(lr=0.1, learn={"lr": "tensor"}), "steps": 2, "checkpoint": checkpoint}
    meta = metafast.MAML(net, loss_fn, adapt_parameters=selection, **arguments)
    loss = query_losses(net, loss_fn, *batches, 2, lambda _, name: meta.rates.lr[names.index(name)], names=names).mean()
    _, found = meta_gradients(meta, *batches)
    assert distance(found, gradients(loss, meta.parameters())) < 1e-9
    assert list(meta.adapt(batches[0]).params) == names


def test_a_tied_parameter_matches_by_any_of_its_names(generator):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.second(torch.tanh(self.first(x))) * self.scale

    model = Tied().double()
    batch = {name: torch.randn(2, 4, 3, generator=generator, dtype=torch.float64) for name in "xy"}
    meta = metafast.MAML(model, loss_fn, inner=SGD(lr=0.3), steps=2, adapt_parameters="second.weight")
    loss = query_losses(model, loss_fn, batch, batch, 2, 0.3, names=["first.weight"]).mean()
    _, found = meta_gradients(meta, batch, batch)
    assert distance(found, gradients(loss, meta.parameters())) < 1e-9
    assert list(meta.adapt(batch).params) == ["first.weight"]


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        (
            "decoder.*",
            ValueError,
            r"adapt_parameters: expected to match a parameter of body.0.weight, .*; got 'decoder.\*'",
        ),
        (3, TypeError, r"adapt_parameters: expected patterns or a callable\(name, parameter\), got int"),
        ([3], TypeError, r"adapt_parameters: expected patterns or a callable\(name, parameter\), got a list of int"),
    ],
)
def test_bad_selection(net, selection, error, message):
    with pytest.raises(error, match=message):
        metafast.MAML(net, loss_fn, inner=SGD(lr=0.1), adapt_parameters=selection)


def test_anil_takes_one_of_head_and_adapt_parameters(net):
    with pytest.raises(ValueError, match="adapt_parameters: expected none beside head"):
        metafast.ANIL(net, loss_fn, head="head.*", inner=SGD(lr=0.1), adapt_parameters="head.*")


# --- MAML++ ---------------------------------------------------------------------------------------------------------


def test_multi_step_weights_anneal_as_in_the_authors_code():
    """get_per_step_loss_importance_vector of HowToTrainYourMAMLPytorch, written out."""
    steps, epochs = 5, 10
    meta = metafast.MAMLPlusPlus(
        Net(), loss_fn, inner=SGD(lr=0.1), steps=steps, multi_step_epochs=epochs, first_order_epochs=4
    )
    for epoch in range(epochs + 2):
        decay, least = 1 / steps / epochs, 0.03 / steps
        early = max(1 / steps - epoch * decay, least)
        last = min(1 / steps + epoch * (steps - 1) * decay, 1 - (steps - 1) * least)
        expected = None if epoch >= epochs else pytest.approx([early] * (steps - 1) + [last], abs=1e-12)
        assert meta.step_weights == expected
        assert meta.order == (1 if epoch < 4 else 2)
        meta.next_epoch()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_maml_plus_plus(net, batches, generator, epoch, checkpoint):
    meta = metafast.MAMLPlusPlus(
        net,
        loss_fn,
        inner=SGD(lr=0.1),
        steps=STEPS,
        multi_step_epochs=3,
        first_order_epochs=1,
        checkpoint=checkpoint,
    )
    scattered(meta, generator)
    for _ in range(epoch):
        meta.next_epoch()
    loss, found = meta_gradients(meta, *batches)
    early = 1 / 3 - epoch / 9
    expected_loss = query_losses(
        net,
        loss_fn,
        *batches,
        STEPS,
        lambda step, name: rate(meta, "tensor_step", step, name),
        step_weights=[early, early, 1 - 2 * early] if epoch < 3 else None,
        create_graph=epoch > 0,
    ).mean()
    assert abs(loss - expected_loss) < 1e-12
    assert distance(found, gradients(expected_loss, meta.parameters())) < 1e-9


def test_maml_plus_plus_resumes_in_its_epoch(net, batches):
    def learner():
        arguments = {"steps": 2, "multi_step_epochs": 3, "first_order_epochs": 1}
        return metafast.MAMLPlusPlus(copy.deepcopy(net), loss_fn, inner=SGD(lr=0.1), **arguments)

    meta, resumed = learner(), learner()
    meta.next_epoch()
    resumed.load_state_dict(meta.state_dict())
    assert (resumed.epoch, resumed.order, resumed.step_weights) == (1, 2, meta.step_weights)
    assert torch.equal(meta(*batches), resumed(*batches))


def test_step_weights_are_as_many_as_steps(net):
    with pytest.raises(TypeError, match="step_weights: expected 2 numbers, one per step, got int"):
        metafast.MAML(nn.Linear(2, 2), loss_fn, inner=SGD(lr=0.1), steps=2, step_weights=3)
    with pytest.raises(ValueError, match="step_weights: expected 2 numbers, one per step, got 3"):
        metafast.MAML(net, loss_fn, inner=SGD(lr=0.1), steps=2, step_weights=[1, 1, 1])
