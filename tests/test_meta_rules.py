"""Every rule of metafast.inner inside the inner loop: kept and rebuilt graphs against a plain loop in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_loop import at, distance, gradients, meta_gradients, task
from torch import nn

import metafast
from metafast.inner import SGD, Adam, AdamW, RMSprop

TASKS, STEPS, EPS = 3, 3, 1e-3
RULES = [
    SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.02),
    Adam(lr=0.05, eps=EPS, weight_decay=0.02),
    AdamW(lr=0.05, eps=EPS, weight_decay=0.02),
    RMSprop(lr=0.05, eps=EPS, momentum=0.5, weight_decay=0.02),
    SGD(lr=0.1, clip_norm=0.3),
    SGD(lr=0.1, clip_value=0.05),
    SGD(lr=0.1, momentum=0.9, learn={"lr": "tensor_step"}, learn_log=True),
    Adam(lr=0.05, eps=EPS, learn={"lr": "parameter"}),
    AdamW(lr=0.05, eps=EPS, learn={"lr": "step", "weight_decay": "number"}),
    RMSprop(lr=0.05, eps=EPS, learn={"lr": "tensor"}, clip_norm=0.3),
]


@pytest.fixture
def net(generator):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.fixture
def batches(generator):
    return [
        tuple(torch.randn(TASKS, shots, n, generator=generator, dtype=torch.float64) for n in (3, 2))
        for shots in (4, 6)
    ]


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def plain_step(rule, params, grads, state, step, lr, decay):
    """Formulas of torch's documentation; ``lr`` and ``decay`` by name."""
    if rule.clip_norm is not None:
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        grads = [g * (rule.clip_norm / (norm + 1e-6)).clamp(max=1.0) for g in grads]
    if rule.clip_value is not None:
        grads = [g.clamp(-rule.clip_value, rule.clip_value) for g in grads]
    new = {}
    for (name, p), g in zip(params.items(), grads, strict=True):
        if isinstance(rule, AdamW):
            p = p - lr[name] * decay[name] * p
        else:
            g = g + decay[name] * p
        s = state.setdefault(name, {})
        if isinstance(rule, SGD):
            s["b"] = g if step == 0 else rule.momentum * s["b"] + g
            direction = g + rule.momentum * s["b"] if rule.nesterov else s["b"]
        elif isinstance(rule, Adam):
            s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
            s["v"] = 0.999 * s.get("v", 0) + 0.001 * g * g
            root = (s["v"] / (1 - 0.999 ** (step + 1))).sqrt()
            direction = s["m"] / (1 - 0.9 ** (step + 1)) / (root + rule.eps)
        else:
            s["v"] = 0.99 * s.get("v", 0) + 0.01 * g * g
            s["b"] = rule.momentum * s.get("b", 0) + g / (s["v"].sqrt() + rule.eps)
            direction = s["b"]
        new[name] = p - lr[name] * direction
    return new


def plain_loss(meta, rule, batches):
    def rate(name, step):
        values = meta.rates(step).get(name, getattr(rule, name))
        return values if isinstance(values, dict) else {n: values for n, _ in meta.model.named_parameters()}

    losses = []
    for index in range(TASKS):
        params, state = dict(meta.model.named_parameters()), {}
        for step in range(STEPS):
            loss = loss_fn(at(meta.model, params), task(batches[0], index))
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = plain_step(rule, params, grads, state, step, rate("lr", step), rate("weight_decay", step))
        losses.append(loss_fn(at(meta.model, params), task(batches[1], index)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_is_the_plain_loop(net, batches, rule, checkpoint):
    meta = metafast.MAML(net, loss_fn, inner=rule, steps=STEPS, checkpoint=checkpoint)
    expected = plain_loss(meta, rule, batches)
    loss, found = meta_gradients(meta, *batches)
    assert abs(loss - expected) < 1e-12
    assert distance(found, gradients(expected, meta.parameters())) < (1e-9 if isinstance(rule, SGD) else 1e-7)


@pytest.mark.parametrize("rule", RULES[:4], ids=str)
def test_state_is_each_tasks_own_when_adapting(net, batches, rule):
    """A task alone comes to what it comes to among others."""
    meta = metafast.MAML(net, loss_fn, inner=rule, steps=STEPS)
    together = meta.adapt(batches[0]).params
    for index in range(TASKS):
        alone = meta.adapt(tuple(x[index : index + 1] for x in batches[0])).params
        for name, p in alone.items():
            torch.testing.assert_close(together[name][index], p[0], rtol=1e-10, atol=1e-12)
