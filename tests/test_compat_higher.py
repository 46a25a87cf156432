"""The higher adapter against plain loops in float64 and, where it is installed, higher itself."""

from __future__ import annotations

import copy
import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from compat_models import Normed, Recurrent, Tied
from plain_loop import distance, gradients
from torch import nn
from torch.func import functional_call

import metafast.compat.higher as ours

STEPS = 3


@pytest.fixture
def data(generator):
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(4)]


@pytest.fixture
def higher():
    try:
        return importlib.import_module("higher")
    except ImportError as error:
        pytest.skip(f"higher does not import: {error}")


def run(library, model, opt, data, copy_initial_weights=False, override=None, each_step=None, **step_options):
    """A script as its users write them."""
    x, y, query_x, query_y = data
    opt.zero_grad()
    with library.innerloop_ctx(model, opt, copy_initial_weights=copy_initial_weights, override=override) as (
        fmodel,
        diffopt,
    ):
        for step in range(STEPS):
            diffopt.step(F.mse_loss(fmodel(x), y), **(each_step(step) if each_step else step_options))
        loss = F.mse_loss(fmodel(query_x), query_y)
        loss.backward()
        start = [p.grad for p in fmodel.parameters(time=0)] if copy_initial_weights else []
        return loss.detach(), [p.grad for p in model.parameters()], start, dict(fmodel.named_buffers())


def plain(model, data, lr, momentum=0.0, weight_decay=0.0, nesterov=False, wanted=()):
    x, y, query_x, query_y = data
    params, velocity = dict(model.named_parameters()), {}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for step in range(STEPS):
            loss = F.mse_loss(functional_call(model, params, (x,)), y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            for (name, p), g in zip(list(params.items()), grads, strict=True):
                g = g + weight_decay * p
                velocity[name] = g if step == 0 else momentum * velocity[name] + g
                params[name] = p - lr * (g + momentum * velocity[name] if nesterov else velocity[name])
        loss = F.mse_loss(functional_call(model, params, (query_x,)), query_y)
        return loss.detach(), gradients(loss, [*model.parameters(), *wanted])


SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [Tied, Recurrent])
def test_sgd_is_the_plain_loop(generator, data, kind, settings):
    model = kind().double()
    expected_loss, expected = plain(model, data, **settings)
    before = copy.deepcopy(model.state_dict())
    loss, grads, _, _ = run(ours, model, torch.optim.SGD(model.parameters(), **settings), data)
    assert abs(loss - expected_loss) < 1e-12
    assert distance(grads, expected) < 1e-9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", [Recurrent, Normed])
def test_sgd_is_highers(generator, data, higher, kind, copied, settings):
    model = kind().double()
    results = []
    for library in (higher, ours):
        twin = copy.deepcopy(model)
        opt = torch.optim.SGD(twin.parameters(), **settings)
        # A state to start from.
        F.mse_loss(twin(data[0]), data[1]).backward()
        opt.step()
        results.append(run(library, twin, opt, data, copied))
    (expected_loss, expected, expected_start, expected_buffers), (loss, grads, start, buffers) = results
    assert abs(loss - expected_loss) < 1e-12
    if copied:
        assert all(g is None for g in grads)
        grads, expected = start, expected_start
    assert distance(grads, expected) < 1e-9
    for name, buffer in expected_buffers.items():
        torch.testing.assert_close(buffers[name], buffer)


def plain_adaptive(kind, params, grads, state, step, lr, weight_decay, **settings):
    """A step of Adam, AdamW or RMSprop as their papers and torch's documentation write them."""
    new = {}
    for (name, p), g in zip(params.items(), grads, strict=True):
        if kind is torch.optim.AdamW:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
        if kind is torch.optim.RMSprop:
            v = 0.99 * state.get((name, "v"), 0) + 0.01 * g * g
            b = settings["momentum"] * state.get((name, "b"), 0) + g / (v.sqrt() + 1e-3)
            state[name, "v"], state[name, "b"] = v, b
            new[name] = p - lr * b
        else:
            m = 0.9 * state.get((name, "m"), 0) + 0.1 * g
            v = 0.999 * state.get((name, "v"), 0) + 0.001 * g * g
            state[name, "m"], state[name, "v"] = m, v
            new[name] = p - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-3)
    return new


ADAPTIVE = [
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.RMSprop, {"weight_decay": 0.1, "momentum": 0.5}),
]


@pytest.mark.parametrize(("kind", "settings"), ADAPTIVE)
def test_adaptive_optimizers_are_their_formulas(generator, data, kind, settings):
    model = Recurrent().double()
    x, y, query_x, query_y = data
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    params, state = dict(model.named_parameters()), {}
    for step in range(1, STEPS + 1):
        loss = F.mse_loss(functional_call(model, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = plain_adaptive(kind, params, grads, state, step, lr, **settings)
    expected_loss = F.mse_loss(functional_call(model, params, (query_x,)), query_y)
    expected = gradients(expected_loss, [*model.parameters(), lr])
    opt = kind(model.parameters(), lr=1.0, eps=1e-3, **settings)
    loss, grads, _, _ = run(ours, model, opt, data, override={"lr": [lr]})
    assert abs(loss - expected_loss) < 1e-12
    assert distance([*grads, lr.grad], expected) < 1e-9


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_adam_is_highers(generator, data, higher, started, amsgrad):
    """From a state that torch's optimizer has come to, or from none."""
    model = Recurrent().double()
    results, before = [], 2 if started else 0

    def torchs(step):
        # higher adds eps before it corrects the bias of v, torch after that. With a tiny eps it would not matter, but
        # then derivatives at the first step, of g / |g|, are nothing but rounding.
        return {"override": {"eps": [1e-3 / (1 - 0.999 ** (before + step + 1)) ** 0.5]}}

    for library in (higher, ours):
        twin = copy.deepcopy(model)
        opt = torch.optim.Adam(twin.parameters(), lr=0.01, eps=1e-3, weight_decay=0.1, amsgrad=amsgrad)
        for _ in range(before):
            opt.zero_grad()
            F.mse_loss(twin(data[0]), data[1]).backward()
            opt.step()
        for state in opt.state.values():
            state["step"] = state["step"].double()  # higher computes the corrections in its precision
        results.append(run(library, twin, opt, data, each_step=torchs if library is ours else None))
    (expected_loss, expected, _, _), (loss, grads, _, _) = results
    assert abs(loss - expected_loss) < 1e-12
    assert distance(grads, expected) < 1e-9


@pytest.mark.parametrize(("kind", "settings"), ADAPTIVE)
def test_adaptive_optimizers_without_a_graph_are_torchs(generator, data, kind, settings):
    model = Recurrent().double()
    twin = copy.deepcopy(model)
    found = []
    for net in (model, twin):
        opt = kind(net.parameters(), lr=0.01, **settings)
        F.mse_loss(net(data[0]), data[1]).backward()
        opt.step()
        if net is model:
            with ours.innerloop_ctx(net, opt, track_higher_grads=False) as (fmodel, diffopt):
                for _ in range(STEPS):
                    diffopt.step(F.mse_loss(fmodel(data[0]), data[1]))
                found = list(fmodel.parameters())
            continue
        for _ in range(STEPS):
            opt.zero_grad()
            F.mse_loss(net(data[0]), data[1]).backward()
            opt.step()
    for p, expected in zip(found, twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-9, atol=1e-12)


def test_learned_rates(generator, data):
    model = Tied().double()
    lr, decay = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.1, 0.03))
    expected_loss, expected = plain(model, data, lr, momentum=0.5, weight_decay=decay, wanted=(lr, decay))
    opt = torch.optim.SGD(model.parameters(), lr=7.0, momentum=0.5)
    loss, grads, _, _ = run(ours, model, opt, data, override={"lr": [lr], "weight_decay": [decay]})
    assert abs(loss - expected_loss) < 1e-12
    assert distance([*grads, lr.grad, decay.grad], expected) < 1e-9


@pytest.mark.parametrize("learned", [False, True])
def test_groups_overrides_and_callbacks(generator, data, higher, learned):
    """Two groups, an override for each, and clipped gradients; a parameter is in no group."""
    model = Recurrent().double()
    results = []
    for library in (higher, ours):
        twin = copy.deepcopy(model)
        params = list(twin.parameters())
        opt = torch.optim.SGD([{"params": params[4:]}, {"params": params[1:4], "momentum": 0.9}], lr=0.1)
        lrs = [torch.tensor(value, dtype=torch.float64, requires_grad=learned) for value in (0.05, 0.2)]
        loss, grads, _, _ = run(
            library,
            twin,
            opt,
            data,
            override={"lr": lrs},
            grad_callback=lambda grads: [None if g is None else g.clamp(-0.1, 0.1) for g in grads],
        )
        results.append((loss, [*grads, *(lr.grad for lr in lrs if learned)]))
    assert abs(results[0][0] - results[1][0]) < 1e-12
    assert distance(results[1][1], results[0][1]) < 1e-9


def test_evaluation_keeps_no_graph(generator, data):
    model = Normed().double()
    twin = copy.deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ours.innerloop_ctx(model, opt, track_higher_grads=False) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(F.mse_loss(fmodel(data[0]), data[1]))
        assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
        with pytest.raises(
            ValueError, match="time: expected None, 0 or -1, since higher gradients are not tracked, got 1"
        ):
            fmodel.parameters(time=1)
        with pytest.raises(ValueError, match="init_fast_params: expected track_higher_grads=True"):
            fmodel.init_fast_params  # noqa: B018
        found = fmodel(data[2])
    plain_opt = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        plain_opt.zero_grad()
        F.mse_loss(twin(data[0]), data[1]).backward()
        plain_opt.step()
    torch.testing.assert_close(found, twin(data[2]))
    assert model[1].num_batches_tracked == 0  # the copy's buffers are its own


def test_functional_models(generator, data):
    model = Tied().double()
    with ours.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fmodel, diffopt):
        assert isinstance(fmodel, Tied)
        assert fmodel.first.weight is fmodel.second.weight
        assert len(list(fmodel.parameters())) == len(list(model.parameters()))
        start = fmodel(data[0])
        torch.testing.assert_close(start, model(data[0]))
        new = diffopt.step(start.square().mean())
        assert all(a is b for a, b in zip(new, fmodel.fast_params, strict=True))
        assert all(a is b for a, b in zip(fmodel.parameters(time=0), fmodel.init_fast_params, strict=True))
        # Parts of it can be called, and see the fast parameters.
        torch.testing.assert_close(fmodel.first(data[0]), F.linear(data[0], new[0], new[1]))
        torch.testing.assert_close(fmodel(data[0], params=fmodel.init_fast_params), start)
        torch.testing.assert_close(fmodel(data[0]), start)
        with pytest.raises(ValueError, match="params: expected 7 tensors, one per parameter, got 1"):
            fmodel(data[0], params=new[:1])
        assert not fmodel.eval().training
        assert model.training


def test_frozen_parameters_and_a_device(generator, data):
    model = Normed().double()
    model[0].weight.requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with ours.innerloop_ctx(model, opt, device=torch.device("cpu")) as (fmodel, diffopt):
        new = diffopt.step(F.mse_loss(fmodel(data[0]), data[1]))
    assert torch.equal(new[0], model[0].weight)
    assert not torch.equal(new[2], model[1].weight)


def test_what_is_refused(generator):
    model = nn.Linear(2, 2)
    names = ", ".join(f"torch.optim.{name}" for name in ("SGD", "AdamW", "Adam", "RMSprop"))
    served = re.escape(f"opt: expected one of {names}, got Adagrad")
    with pytest.raises(TypeError, match=served), ours.innerloop_ctx(model, torch.optim.Adagrad(model.parameters())):
        pass
    with (
        pytest.raises(ValueError, match="opt: expected parameters of the model alone, got 2 that are none"),
        ours.innerloop_ctx(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)),
    ):
        pass
    with pytest.raises(AttributeError, match="has innerloop_ctx, and no 'create_diff_optim': take that from higher"):
        ours.create_diff_optim  # noqa: B018
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with (
        pytest.raises(ValueError, match=r"override\['lr'\]: expected 1 value or 1, one per group, got 2"),
        ours.innerloop_ctx(model, opt, override={"lr": [1.0, 2.0]}),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"override: expected settings of the optimizer, lr, .*; got 'learning_rate'"),
        ours.innerloop_ctx(model, opt, override={"learning_rate": [1.0]}),
    ):
        pass
    momentum = torch.tensor(0.5, requires_grad=True)
    with ours.innerloop_ctx(model, opt, override={"momentum": [momentum]}) as (fmodel, diffopt):
        with pytest.raises(
            TypeError, match=r"override: expected learned tensors for lr and weight_decay alone, .* momentum"
        ):
            diffopt.step(fmodel(torch.ones(1, 2)).sum())
        with pytest.raises(ValueError, match="model: expected a module that is not a functional copy already"):
            ours.patch.monkeypatch(fmodel)
