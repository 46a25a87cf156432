"""``torch.utils.checkpoint`` in and around models of the adapters, against plain loops in float64 that recompute nothing."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from plain_loop import distance, gradients
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import metafast
import metafast.compat.higher as higher
import metafast.compat.learn2learn as learn2learn

LR, STEPS = 0.1, 3


class Block(nn.Module):
    """Attention, dropout, batch norm and a buffer that is read and written."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        attended, _ = self.attention(x[None], x[None], x[None], need_weights=False)
        hidden = F.dropout(self.norm(attended[0]), 0.3, self.training)
        with torch.no_grad():
            self.scale.mul_(1.1)
        return torch.tanh(self.linear(hidden) * self.scale.clone())


class Net(nn.Module):
    """Recomputes its middle; the first and the last layer share their weight, and the second block runs twice.

    Args:
        how: it recomputes.
        registered: the second block under two names. Torch's functional_call, which the plain loop is made of, leaves such
            a model changed.
    """

    def __init__(self, how="plain", registered=False):
        super().__init__()
        self.how = how
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        if registered:
            self.blocks.append(self.blocks[1])
        self.recurrence = nn.GRU(4, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.encode(torch.tanh(self.first(x))))

    def encode(self, x):
        if self.how == "plain":
            return self.recurrence(self.middle(x))[0]
        if self.how == "nested":
            return checkpoint(self.inside, x, use_reentrant=False)
        for block in self.sequence():
            x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return checkpoint(lambda h: self.recurrence(h)[0], x, use_reentrant=self.how == "reentrant")

    def sequence(self):
        return [self.blocks[i] for i in (0, 1, -1)]

    def middle(self, x):
        for block in self.sequence():
            x = block(x)
        return x

    def inside(self, x):
        for block in self.sequence():
            x = checkpoint(block, x, use_reentrant=False)
        return checkpoint(lambda h: self.recurrence(h)[0], x, use_reentrant=False)


@pytest.fixture
def data(generator):
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(4)]


def twins(how, registered=True):
    plain = Net().double()
    recomputing = Net(how, registered).double()
    recomputing.load_state_dict(plain.state_dict(), strict=False)
    return plain, recomputing


def outputs(call, data):
    """With the same random numbers in both loops, and attention that torch can differentiate twice.

    What goes around the adapters' forward is not accelerated.
    """
    torch.manual_seed(1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return call(*data)


def plain_loop(model, x, y, query_x, query_y, order=2, lrs=None):
    params = dict(model.named_parameters())
    for _ in range(STEPS):
        loss = F.mse_loss(functional_call(model, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=order == 2)
        rates = lrs or [LR] * len(grads)
        params = {name: p - lr * g for (name, p), g, lr in zip(params.items(), grads, rates, strict=True)}
    model.eval()
    loss = F.mse_loss(functional_call(model, params, (query_x,)), query_y)
    return loss.detach(), gradients(loss, [*model.parameters(), *(lrs or [])])


def whole(learner, x):
    return learner(x)


def module(learner, x):
    return learner.module(x)


def parts(learner, x):
    """By submodules and methods, as a script that goes around the model's forward."""
    net = getattr(learner, "module", learner)
    return net.last(net.encode(torch.tanh(net.first(x))))


def around(learner, x):
    """The script's own checkpoint, of the whole call."""
    return checkpoint(lambda inputs: learner(inputs), x, use_reentrant=False)


def check(found, expected, model, twin):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert abs(loss - expected_loss) < 1e-12
    assert distance(grads, expected_grads) < 1e-10
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


@pytest.mark.parametrize("call", [whole, parts, around])
@pytest.mark.parametrize("how", ["each", "nested"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_higher(generator, data, how, call, backward_inside):
    """The query runs in eval mode, after which the steps are recomputed as they were: in train mode."""
    twin, model = twins(how)
    expected = outputs(lambda *batch: plain_loop(twin, *batch), data)

    def script(x, y, query_x, query_y):
        opt = torch.optim.SGD(model.parameters(), lr=LR)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(STEPS):
                diffopt.step(F.mse_loss(call(fmodel, x), y))
            fmodel.eval()
            loss = F.mse_loss(call(fmodel, query_x), query_y)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return (loss.detach(), [p.grad for p in model.parameters()]), fmodel

    found, fmodel = outputs(script, data)
    check(found, expected, fmodel, twin)


@pytest.mark.parametrize("how", ["each", "nested", "reentrant"])
def test_higher_with_parameters_of_another_step(generator, data, how):
    """Parameters given to the call, then others, and the backward of both at the end."""
    twin, model = twins(how)
    x = data[0].requires_grad_()
    shift = torch.rand((), dtype=torch.float64)

    def script():
        opt = torch.optim.SGD(model.parameters(), lr=LR)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, _):
            loss = fmodel(x).square().mean()
            # Cut off, so that torch's reentrant checkpoint can run backward through it twice.
            shifted = [(p + shift).detach().requires_grad_() for p in fmodel.init_fast_params]
            loss = loss + fmodel(x, params=shifted).square().mean()
            fmodel.fast_params = [p.detach().requires_grad_() for p in fmodel.init_fast_params]
            loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()] + [p.grad for p in shifted]

    loss, grads = outputs(script, ())
    params = dict(twin.named_parameters())
    shifted = {name: (p + shift).detach().requires_grad_() for name, p in params.items()}

    expected = outputs(lambda: twin(x).square().mean() + functional_call(twin, shifted, (x,)).square().mean(), ())
    assert abs(loss - expected) < 1e-12
    assert distance(grads, gradients(expected, [*params.values(), *shifted.values()])) < 1e-10


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("call", [whole, module, parts, around])
@pytest.mark.parametrize("how", ["each", "nested"])
def test_maml(generator, data, how, call, order):
    twin, model = twins(how)
    expected = outputs(lambda *batch: plain_loop(twin, *batch, order=order), data)

    def script(x, y, query_x, query_y):
        clone = learn2learn.algorithms.MAML(model, lr=LR, first_order=order == 1).clone()
        for _ in range(STEPS):
            clone.adapt(F.mse_loss(call(clone, x), y))
        clone.eval()
        loss = F.mse_loss(call(clone, query_x), query_y)
        loss.backward()
        return (loss.detach(), [p.grad for p in model.parameters()]), clone

    found, clone = outputs(script, data)
    check(found, expected, clone.module, twin)


@pytest.mark.parametrize("call", [whole, module, parts])
def test_clones_of_clones(generator, data, call):
    """A clone is adapted, and a clone of it goes on from there; the first one too."""
    twin, model = twins("each")
    twin.eval(), model.eval()

    def script(x, y, query_x, query_y):
        first = learn2learn.algorithms.MAML(model, lr=LR).clone()
        first.adapt(F.mse_loss(call(first, x), y))
        second = first.clone()
        second.adapt(F.mse_loss(call(second, query_x), query_y))
        first.adapt(F.mse_loss(call(first, x), y))
        loss = call(first, query_x).square().mean() + call(second, query_x).square().mean()
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    def step(params, inputs, targets):
        loss = F.mse_loss(functional_call(twin, params, (inputs,)), targets)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        return {name: p - LR * g for (name, p), g in zip(params.items(), grads, strict=True)}

    def plain(x, y, query_x, query_y):
        start = step(dict(twin.named_parameters()), x, y)
        second, first = step(start, query_x, query_y), step(start, x, y)
        loss = functional_call(twin, first, (query_x,)).square().mean()
        loss = loss + functional_call(twin, second, (query_x,)).square().mean()
        return loss.detach(), gradients(loss, twin.parameters())

    check(outputs(script, data), outputs(plain, data), model, twin)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("call", [whole, module, parts])
def test_meta_sgd(generator, data, call, order):
    twin, model = twins("each")
    lrs = [torch.full_like(p, LR).mul_(torch.rand_like(p)).requires_grad_() for p in twin.parameters()]
    expected = outputs(lambda *batch: plain_loop(twin, *batch, order=order, lrs=lrs), data)

    def script(x, y, query_x, query_y):
        meta = learn2learn.algorithms.MetaSGD(model, first_order=order == 1)
        with torch.no_grad():
            for own, lr in zip(meta.lrs, lrs, strict=True):
                own.copy_(lr)
        clone = meta.clone()
        for _ in range(STEPS):
            clone.adapt(F.mse_loss(call(clone, x), y))
        clone.eval()
        loss = F.mse_loss(call(clone, query_x), query_y)
        loss.backward()
        return (loss.detach(), [p.grad for p in [*model.parameters(), *meta.lrs]]), clone

    found, clone = outputs(script, data)
    check(found, expected, clone.module, twin)


def test_functions_of_modules(generator, data):
    """``clone_module`` and ``update_module`` by hand."""
    twin, model = twins("each")
    expected = outputs(lambda *batch: plain_loop(twin, *batch), data)

    def script(x, y, query_x, query_y):
        clone = learn2learn.clone_module(model)
        for _ in range(STEPS):
            grads = torch.autograd.grad(F.mse_loss(clone(x), y), list(clone.parameters()), create_graph=True)
            learn2learn.update_module(clone, [-LR * g for g in grads])
        clone.eval()
        loss = F.mse_loss(clone(query_x), query_y)
        loss.backward()
        return (loss.detach(), [p.grad for p in model.parameters()]), clone

    found, clone = outputs(script, data)
    check(found, expected, clone, twin)


def test_reentrant_is_refused_by_torch(generator, data):
    """Its backward cannot run in ``autograd.grad``, which every inner step is."""
    _, model = twins("reentrant")
    model.eval()
    x = data[0].requires_grad_()
    refused = r"use_reentrant=True.*is incompatible with \.grad\(\)"
    clone = learn2learn.algorithms.MAML(model, lr=LR).clone()
    with pytest.raises(RuntimeError, match=refused):
        clone.adapt(F.mse_loss(clone(x), data[1]))
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt), pytest.raises(RuntimeError, match=refused):
        diffopt.step(F.mse_loss(fmodel(x), data[1]))


@pytest.mark.parametrize("how", ["each", "reentrant"])
def test_other_models_are_left_alone(generator, data, how):
    """A model that is no clone checkpoints as ever, beside one."""
    _, model = twins(how)
    found = []
    for other in (copy.deepcopy(model), model):
        torch.manual_seed(1)
        loss = other(data[0].clone().requires_grad_()).square().mean()
        loss.backward()
        found.append([*(p.grad for p in other.parameters()), *other.buffers()])
        clone = learn2learn.algorithms.MAML(nn.Linear(4, 4), lr=LR).clone()
    assert type(clone.module) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_kept(generator, data):
    """Clones and their tensors go when the script lets go of them."""
    _, model = twins("each")
    learner = learn2learn.algorithms.MAML(model, lr=LR)
    clone = learner.clone()
    clone.adapt(F.mse_loss(clone(data[0]), data[1]))
    loss = clone(data[2]).square().mean()
    loss.backward()
    seen = [weakref.ref(clone), *(weakref.ref(p) for p in clone.parameters())]
    del clone, loss
    gc.collect()
    assert all(ref() is None for ref in seen)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_learners_recompute_what_they_computed(generator, data, checkpointed):
    """A checkpoint within a checkpoint, in a model that its loss function switches to eval mode and back."""
    twin, model = twins("nested", registered=False)

    def loss_fn(net, batch):
        x, y, training = batch
        net.train(training.numel() == 1)
        return F.mse_loss(net(x), y)

    x, y, query_x, query_y = data
    support, query = (x[None], y[None], torch.ones(1, 1)), (query_x[None], query_y[None], torch.ones(1, 2))
    expected_loss, expected = outputs(lambda *batch: plain_loop(twin, *batch), data)
    meta = metafast.MAML(
        model,
        loss_fn,
        inner=metafast.inner.SGD(lr=LR),
        steps=STEPS,
        order=2,
        task_batching="loop",
        checkpoint=checkpointed,
    )

    def script():
        loss = meta(support, query)
        loss.backward()
        return loss.detach()

    assert abs(outputs(script, ()) - expected_loss) < 1e-12
    assert distance([p.grad for p in model.parameters()], expected) < 1e-10


def test_checkpoint_sequential(generator, data):
    layers = [layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())]
    twin = nn.Sequential(*layers).double()
    model = copy.deepcopy(twin)
    expected_loss, expected = plain_loop(twin, *data)
    x, y, query_x, query_y = data
    clone = learn2learn.algorithms.MAML(model, lr=LR).clone()

    def call(inputs):
        return checkpoint_sequential(clone.module, 3, inputs, use_reentrant=False)

    for _ in range(STEPS):
        clone.adapt(F.mse_loss(call(x), y))
    clone.eval()
    loss = F.mse_loss(call(query_x), query_y)
    loss.backward()
    assert abs(loss.detach() - expected_loss) < 1e-12
    assert distance([p.grad for p in model.parameters()], expected) < 1e-10
