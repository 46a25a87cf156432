"""SGD for all parameters of all tasks, forward and with its vector-Jacobian product, against eager torch and foreach."""

from __future__ import annotations

import pytest
import torch

from metafast import inner, task_update
from metafast.models import EncoderClassifier
from metafast.testing import relative_error

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01
PLAIN, FULL = inner.SGD(lr=LR), inner.SGD(lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def many_small(device):
    """The parameters of a 2-layer classifier of width 64, for 32 tasks."""
    return [torch.randn(32, *p.shape, device=device) for p in EncoderClassifier(5).parameters()]


def one_large(device):
    return [torch.randn(1, 2**26, device=device)]


SHAPES = {"many small tensors, T=32": many_small, "one tensor of 64 M": one_large}


def eager(params, grads, buffers):
    decayed = [g + DECAY * p for p, g in zip(params, grads, strict=True)]
    new = [MOMENTUM * b + g for b, g in zip(buffers, decayed, strict=True)]
    return [p - LR * b for p, b in zip(params, new, strict=True)], new


def foreach(params, grads, buffers):
    decayed = torch._foreach_add(grads, params, alpha=DECAY)
    new = torch._foreach_add(torch._foreach_mul(buffers, MOMENTUM), decayed)
    return torch._foreach_sub(params, torch._foreach_mul(new, LR)), new


def ours(params, grads, buffers):
    new, state = task_update(FULL, params, grads, {"momentum_buffer": buffers}, step=1, backend="fused")
    return new, state["momentum_buffer"]


@pytest.mark.parametrize("name", SHAPES)
def test_sgd_forward(name, measure, device, benchmark):
    benchmark.group = f"SGD forward, {name}"
    params, grads = SHAPES[name](device), SHAPES[name](device)

    def call():
        return task_update(PLAIN, params, grads, backend="fused")[0]

    def against():
        return torch._foreach_add(params, grads, alpha=-LR)

    for found, expected in zip(call(), against(), strict=True):
        assert relative_error(found, expected) < 1e-6
    measure("fused", call, "foreach", against)


@pytest.mark.parametrize("baseline", [eager, foreach], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SHAPES)
def test_sgd_with_momentum_and_decay_and_its_derivative(name, baseline, measure, device, benchmark):
    benchmark.group = f"SGD momentum, forward + VJP, {name}"
    groups = [[x.requires_grad_() for x in SHAPES[name](device)] for _ in range(3)]
    inputs = [x for group in groups for x in group]
    cotangents = [torch.randn_like(x) for x in groups[0] + groups[0]]

    def step(update):
        new, state = update(*groups)
        return torch.autograd.grad([*new, *state], inputs, cotangents)

    for found, expected in zip(step(ours), step(baseline), strict=True):
        assert relative_error(found, expected) < 1e-6
    measure(f"fused / {baseline.__name__}", lambda: step(ours), baseline.__name__, lambda: step(baseline), rounds=5)
