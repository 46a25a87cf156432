"""Update rules for all parameters of all tasks, forward and with their products.

Forward against one `torch.add` on a single tensor of the same total size, which is as fast as memory goes; forward and
product against eager torch, `torch._foreach` and TorchOpt.
"""

from __future__ import annotations

import pytest
import torch

from metafast import inner, task_update
from metafast.engine.memory_budget import free_bytes
from metafast.measure import peak_memory
from metafast.models import EncoderClassifier
from metafast.testing import relative_error

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01
PLAIN, FULL = inner.SGD(lr=LR), inner.SGD(lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def many_small(device):
    """The parameters of a 2-layer classifier of width 64, for 32 tasks."""
    return [torch.randn(32, *p.shape, device=device) for p in EncoderClassifier(5).parameters()]


def one_large(device):
    return [torch.randn(1, 2**26, device=device)]


def bert_base(device):
    """The 199 parameters of BERT-base, for 2 tasks."""
    wide, inner_width = 768, 3072
    layer = [(wide, wide), (wide,)] * 4 + [(inner_width, wide), (inner_width,), (wide, inner_width), (wide,)]
    layer += [(wide,)] * 4
    shapes = [(30522, wide), (512, wide), (2, wide), (wide,), (wide,), *layer * 12, (wide, wide), (wide,)]
    assert len(shapes) == 199
    return [torch.randn(2, *shape, device=device) for shape in shapes]


BERT = "BERT-base, T=2"
SHAPES = {"many small tensors, T=32": many_small, "one tensor of 64 M": one_large}
ALL_SHAPES = {**SHAPES, BERT: bert_base}
# An eager step of BERT-base's two tasks takes this many bytes with its graph, and seconds.
BERT_BYTES = 16 * 2**30


def skip_unless_it_fits(name, device):
    free = free_bytes(torch.device(device))
    if name == BERT and free is not None and free < BERT_BYTES:
        pytest.skip(f"takes {BERT_BYTES / 2**30:.0f} GiB of memory")


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


@pytest.mark.parametrize("name", ALL_SHAPES)
def test_sgd_forward(name, measure, device, benchmark):
    """Both write new memory, which the system has to clear first."""
    benchmark.group = f"SGD forward, {name}"
    params, grads = ALL_SHAPES[name](device), ALL_SHAPES[name](device)
    whole_params, whole_grads = (torch.cat([x.flatten() for x in group]) for group in (params, grads))

    def call():
        return task_update(PLAIN, params, grads, backend="fused")[0]

    def against():
        return torch.add(whole_params, whole_grads, alpha=-LR)

    found, expected = call(), against()
    for part, tensor in zip(expected.split([x.numel() for x in found]), found, strict=True):
        assert relative_error(tensor.flatten(), part) < 1e-6
    del found, expected, part, tensor
    moved = 3 * whole_params.nbytes
    measure(
        "fused",
        call,
        {"add on one tensor": against},
        {"add on one tensor": 0.9},
        rounds=9 if moved < 2**28 else 3,
        moved=moved,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_memory_of_a_derivative(name, measure, device, benchmark):
    benchmark.group = f"SGD momentum, VJP, {name}"
    groups = [[x.requires_grad_() for x in SHAPES[name](device)] for _ in range(3)]
    inputs = [x for group in groups for x in group]
    results = [x for group in ours(*groups) for x in group]
    cotangents = [torch.randn_like(x) for x in results]

    def call():
        return torch.autograd.grad(results, inputs, cotangents, retain_graph=True)

    wanted = sum(x.nbytes for x in inputs)
    assert peak_memory(call, device) <= 1.01 * wanted, "a product takes memory for more than its results"
    measure("fused", call, {}, rounds=3, moved=sum(x.nbytes for x in cotangents) + wanted)


@pytest.mark.parametrize("baseline", [eager, foreach], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ALL_SHAPES)
def test_sgd_with_momentum_and_decay_and_its_derivative(name, baseline, measure, device, benchmark):
    skip_unless_it_fits(name, device)
    benchmark.group = f"SGD momentum, forward + VJP, {name}"
    groups = [[x.requires_grad_() for x in ALL_SHAPES[name](device)] for _ in range(3)]
    inputs = [x for group in groups for x in group]
    cotangents = [torch.randn_like(x) for x in groups[0] + groups[0]]

    def step(update):
        new, state = update(*groups)
        return torch.autograd.grad([*new, *state], inputs, cotangents)

    for found, expected in zip(step(ours), step(baseline), strict=True):
        assert relative_error(found, expected) < 1e-6
    bar = {"eager": 2.5, "foreach": 2 if name.startswith("many") else 1.5}[baseline.__name__]
    peer = baseline.__name__
    measure("fused", lambda: step(ours), {peer: lambda: step(baseline)}, {peer: bar}, rounds=2 if name == BERT else 5)


ADAM = inner.Adam(lr=0.01)


def eager_adam(params, grads, averages, squares):
    """torch.optim.Adam's formula at its second step, differentiable."""
    m = [0.9 * a + 0.1 * g for a, g in zip(averages, grads, strict=True)]
    v = [0.999 * s + 0.001 * g * g for s, g in zip(squares, grads, strict=True)]
    c1, c2 = 1 - 0.9**2, 1 - 0.999**2
    return [p - 0.01 * (a / c1) / ((s / c2).sqrt() + 1e-8) for p, a, s in zip(params, m, v, strict=True)], m, v


def torchopt_adam(params, grads, averages, squares):
    torchopt = pytest.importorskip("torchopt", reason="TorchOpt is not installed")
    optimizer = torchopt.adam(lr=0.01)
    state = optimizer.init(params)
    moments = state[0]._replace(mu=averages, nu=squares, count=[torch.ones((), dtype=torch.int64) for _ in params])
    updates, after = optimizer.update(grads, (moments, *state[1:]), inplace=False)
    return torchopt.apply_updates(params, updates, inplace=False), list(after[0].mu), list(after[0].nu)


def our_adam(params, grads, averages, squares):
    new, state = task_update(ADAM, params, grads, {"exp_avg": averages, "exp_avg_sq": squares}, step=1, backend="fused")
    return new, state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("baseline", [eager_adam, torchopt_adam], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SHAPES)
def test_adam_and_its_derivative(name, baseline, measure, device, benchmark):
    benchmark.group = f"Adam, forward + VJP, {name}"
    groups = [SHAPES[name](device) for _ in range(4)]
    groups[3] = [x.square() + 0.1 for x in groups[3]]
    inputs = [x.requires_grad_() for group in groups for x in group]
    cotangents = [torch.randn_like(x) for x in groups[0] * 3]

    def step(update):
        return torch.autograd.grad([x for group in update(*groups) for x in group], inputs, cotangents)

    for found, expected in zip(step(our_adam), step(baseline), strict=True):
        assert relative_error(found, expected) < 1e-5
    peer = baseline.__name__
    measure("fused", lambda: step(our_adam), {peer: lambda: step(baseline)}, {peer: 4}, rounds=3)


@pytest.mark.parametrize("name", ALL_SHAPES)
def test_meta_sgd_and_its_derivative(name, measure, device, benchmark):
    skip_unless_it_fits(name, device)
    benchmark.group = f"Meta-SGD, forward + VJP, {name}"
    params, grads = ([x.requires_grad_() for x in ALL_SHAPES[name](device)] for _ in range(2))
    rates = [x[0].detach().abs().requires_grad_() for x in ALL_SHAPES[name](device)]
    cotangents, inputs = [torch.randn_like(x) for x in params], [*params, *grads, *rates]

    def ours():
        return torch.autograd.grad(
            task_update(PLAIN, params, grads, rates={"lr": rates}, backend="fused")[0], inputs, cotangents
        )

    def eager():
        new = [p - r * g for p, g, r in zip(params, grads, rates, strict=True)]
        return torch.autograd.grad(new, inputs, cotangents)

    for found, expected in zip(ours(), eager(), strict=True):
        assert relative_error(found, expected) < 1e-5
    measure("fused", ours, {"eager": eager}, {"eager": 2.5}, rounds=3)
