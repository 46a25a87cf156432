"""The learn2learn adapter against plain loops in float64 and, where it is installed, learn2learn itself."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from compat_models import Normed, Recurrent, Tied
from plain_loop import distance, gradients
from torch import nn
from torch.func import functional_call

import metafast.compat.learn2learn as ours

LR, STEPS = 0.1, 3


MODELS = [Tied, Recurrent, Normed]


@pytest.fixture
def data(generator):
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(4)]


def their_library():
    try:
        return importlib.import_module("learn2learn")
    except Exception as error:  # broken builds of it fail in many ways
        pytest.skip(f"learn2learn does not import: {type(error).__name__}: {error}")


def run(library, model, data, first_order):
    """A script as its users write them."""
    x, y, query_x, query_y = data
    maml = library.algorithms.MAML(model, lr=LR, first_order=first_order)
    clone = maml.clone()
    for _ in range(STEPS):
        clone.adapt(F.mse_loss(clone(x), y))
    loss = F.mse_loss(clone(query_x), query_y)
    loss.backward()
    return loss.detach(), [p.grad for p in maml.parameters()], dict(maml.named_buffers())


def plain(model, data, first_order, lrs=None):
    x, y, query_x, query_y = data
    names = [name for name, _ in model.named_parameters()]
    params = dict(model.named_parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for _ in range(STEPS):
            loss = F.mse_loss(functional_call(model, params, (x,)), y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order)
            for i, (name, grad) in enumerate(zip(names, grads, strict=True)):
                params[name] = params[name] - (LR if lrs is None else lrs[i]) * grad
        loss = F.mse_loss(functional_call(model, params, (query_x,)), query_y)
        wanted = [*model.parameters(), *(lrs or [])]
        return loss.detach(), gradients(loss, wanted), dict(model.named_buffers())


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_maml_is_the_plain_loop(generator, data, kind, first_order):
    model = kind().double()
    twin = copy.deepcopy(model)
    loss, grads, buffers = run(ours, model, data, first_order)
    expected_loss, expected, expected_buffers = plain(twin, data, first_order)
    assert abs(loss - expected_loss) < 1e-12
    assert distance(grads, expected) < 1e-9
    for name, buffer in expected_buffers.items():
        torch.testing.assert_close(buffers[f"module.{name}"], buffer)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", [Recurrent, Normed])
def test_maml_is_learn2learns(generator, data, kind, first_order):
    theirs = their_library()
    model = kind().double()
    twin = copy.deepcopy(model)
    loss, grads, buffers = run(ours, model, data, first_order)
    expected_loss, expected, expected_buffers = run(theirs, twin, data, first_order)
    assert abs(loss - expected_loss) < 1e-12
    assert distance(grads, expected) < 1e-9
    for name, buffer in expected_buffers.items():
        torch.testing.assert_close(buffers[name], buffer)


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_sgd(generator, data, first_order):
    model = Tied().double()
    twin = copy.deepcopy(model)
    meta = ours.algorithms.MetaSGD(model, lr=0.1, first_order=first_order)
    with torch.no_grad():
        for lr in meta.lrs:
            lr += 0.02 * torch.randn_like(lr)
    lrs = [lr.detach().clone().requires_grad_() for lr in meta.lrs]
    x, y, query_x, query_y = data
    clone = meta.clone()
    for _ in range(STEPS):
        clone.adapt(F.mse_loss(clone(x), y))
    loss = F.mse_loss(clone(query_x), query_y)
    loss.backward()
    expected_loss, expected, _ = plain(twin, data, first_order, lrs)
    assert abs(loss - expected_loss) < 1e-12
    assert distance([p.grad for p in [*model.parameters(), *meta.lrs]], expected) < 1e-9
    assert len(list(ours.algorithms.MetaSGD(Tied()).parameters())) == 2 * len(list(Tied().parameters()))
    assert all((lr == 1).all() for lr in ours.algorithms.MetaSGD(Tied()).lrs)


def test_clone_module_shares_what_the_original_shares(generator):
    model = Tied()
    clone = ours.clone_module(model)
    assert clone.first.weight is clone.second.weight
    assert clone.first.weight is not model.first.weight
    clone.first.weight.sum().backward()
    assert torch.equal(model.first.weight.grad, torch.ones(4, 4))
    assert type(clone) is Tied
    assert len(list(clone.parameters())) == len(list(model.parameters()))


def test_update_module(generator):
    model = Tied()
    clone = ours.clone_module(model)
    updates = [torch.full_like(p, i + 1.0) for i, p in enumerate(clone.parameters())]
    updates[1] = None
    before = dict(clone.named_parameters())
    assert ours.update_module(clone, updates) is clone
    after = dict(clone.named_parameters())
    for i, (name, p) in enumerate(before.items()):
        torch.testing.assert_close(after[name], p if i == 1 else p + (i + 1))
    assert clone.first.weight is clone.second.weight
    for p in clone.parameters():
        p.update = torch.ones_like(p)
    values = [p.detach().clone() for p in clone.parameters()]
    ours.update_module(clone)
    for p, value in zip(clone.parameters(), values, strict=True):
        torch.testing.assert_close(p.detach(), value + 1)


@pytest.mark.parametrize("lr", [0.1, -0.1, torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])])
def test_maml_update(generator, lr):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lr = lr.requires_grad_() if isinstance(lr, torch.Tensor) else lr
    clone = ours.clone_module(model)
    params = list(clone.parameters())
    grads = [torch.randn_like(p) for p in params]
    grads[2] = None
    assert ours.algorithms.maml.maml_update(clone, lr, grads) is clone
    for p, g, new in zip(params, grads, clone.parameters(), strict=True):
        torch.testing.assert_close(new, p if g is None else p - lr * g)
    if isinstance(lr, torch.Tensor):
        (found,) = torch.autograd.grad(sum(p.sum() for p in clone.parameters()), lr)
        expected = -sum(g.reshape(-1, 4).sum(0) for g in grads if g is not None)
        expected = expected.sum() if lr.numel() == 1 else expected
        torch.testing.assert_close(found, expected.reshape(lr.shape))


def test_maml_update_warns_of_missing_gradients(generator):
    model = nn.Linear(2, 2)
    before = model.bias
    with pytest.warns(UserWarning, match=r"maml_update\(\): expected 2 grads, one per parameter, got 1"):
        ours.algorithms.maml.maml_update(model, 0.1, [torch.ones(2, 2)])
    assert model.bias is before


def test_detach_module(generator):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    clone = ours.clone_module(model)
    ours.detach_module(clone, keep_requires_grad=True)
    clone(torch.ones(1, 2)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.is_leaf and p.grad is not None for p in clone.parameters())
    other = ours.clone_module(model)
    ours.detach_module(other)
    assert not any(p.requires_grad for p in other.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_parameters_without_gradients(generator):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    x = torch.ones(3, 2)
    refused = ours.algorithms.MAML(model, lr=0.1).clone()
    with pytest.raises(RuntimeError, match="adapt: allow_nograd=True or allow_unused=True may help"):
        refused.adapt(refused(x).mean())
    learner = ours.algorithms.MAML(model, lr=0.1, allow_nograd=True).clone()
    learner.adapt(learner(x).mean())
    assert torch.equal(learner.module[0].weight, model[0].weight)
    assert not torch.equal(learner.module[1].weight, model[1].weight)
    unused = ours.algorithms.MAML(nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)]), lr=0.1)
    clone = unused.clone(allow_unused=True)
    clone.adapt(clone.module[0](x).mean())
    assert torch.equal(clone.module[1].weight, unused.module[1].weight)


def test_attributes_of_the_module(generator):
    model = Tied()
    learner = ours.algorithms.MAML(model, lr=0.1)
    assert learner.attention is model.attention
    with pytest.raises(AttributeError, match="nothing"):
        learner.nothing  # noqa: B018
