"""Functions whose batching rules torch has wrong, under their names and as methods."""

from __future__ import annotations

import threading

import pytest
import torch
from plain_loop import gradients, meta_gradients, query_losses
from torch import nn
from torch.func import vmap

import metafast
from metafast.acceleration import accelerated_thread, replaced_names
from metafast.inner import SGD
from metafast.ops.batching import METHODS

TASKS = 3
INDEX = torch.tensor([[0, 2], [1, 1], [3, 0]])


def tied(x):
    """Values with ties among them, and the derivative of x."""
    return (2 * x.detach()).round() / 2 + (x - x.detach())


# Arguments x [4, 5], v [4, 5], s [5] and c [], each of every task's own or shared; i is an index of each task's own.
FUNCTIONS = {
    "select_scatter": lambda x, v, s, c, i: torch.select_scatter(x, s, 0, 1) + x.select_scatter(s, -2, -1),
    "index_fill": lambda x, v, s, c, i: torch.index_fill(x, 0, i, c) + x.index_fill(-1, i, c),
    "index_fill_": lambda x, v, s, c, i: (x + v).index_fill_(0, i, c),
    "max": lambda x, v, s, c, i: torch.max(tied(x)) * c + v.max(),
    "min": lambda x, v, s, c, i: torch.min(tied(x)) * c + v.min(),
    "median": lambda x, v, s, c, i: torch.median(tied(x)) * c + v.median() + x.nanmedian(),
    "max by dimension": lambda x, v, s, c, i: (
        torch.max(x, 0).values + x.max(dim=1).values.sum() + torch.max(x, v).sum(0)
    ),
    "clamp": lambda x, v, s, c, i: torch.clamp(x, v - 0.5, s.abs()) + x.clamp(s - 1, v.abs()) + x.clip(-0.5, 0.5),
    "roll": lambda x, v, s, c, i: torch.roll(c, 2) * x.roll(1, 0) + c.roll(1, ()),
    "logcumsumexp": lambda x, v, s, c, i: torch.logcumsumexp(c, 0) * x.logcumsumexp(0),
    "addr": lambda x, v, s, c, i: torch.addr(x, v[:, 0], s, beta=0) + torch.addr(x, v[:, 1], s),
    "cumprod_": lambda x, v, s, c, i: (x * 1).cumprod_(0),
    "pow_": lambda x, v, s, c, i: (x.abs() + 1).pow_(v),
    "ipow": lambda x, v, s, c, i: ipow(x.abs() + 1, v),
    "hypot_": lambda x, v, s, c, i: (x * 1).hypot_(v),
    "index_reduce_": lambda x, v, s, c, i: (x * 1).index_reduce_(0, i % 4, v[:2], "prod"),
    "as_strided": lambda x, v, s, c, i: x.as_strided((2, 2), (5, 1), 3) * c + torch.as_strided(v, (4,), (5,)).sum(),
    "linear_cross_entropy": lambda x, v, s, c, i: cross_entropy(x, v, i),
}


def ipow(x, y):
    x **= y
    return x


def cross_entropy(x, v, i):
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options", reason="torch has no such function")
    chunked = options.LinearCrossEntropyOptions(allow_retain_graph=True, batch_chunk_size=2)
    return torch.nn.functional.linear_cross_entropy(x, v, torch.cat([i, i]) % 4, options=chunked)


class Call(nn.Module):
    def __init__(self, function, tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, i):
        return self.function(self.x, self.v, self.s, self.c, i)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:index_reduce")
@pytest.mark.parametrize("adapted", ["*", "x", "[vc]", "s"])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in FUNCTIONS]
    + [
        (name, {"capture": True})
        for name in FUNCTIONS
        if name not in ("index_reduce_", "linear_cross_entropy", "index_fill_")
    ],
)
def test_meta_gradients_are_the_plain_loops(generator, name, adapted, options):
    """Of what every task has its own of (after the first step), and of what all share."""
    shapes = {"x": (4, 5), "v": (4, 5), "s": (5,), "c": ()}
    tensors = {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}
    model = Call(FUNCTIONS[name], tensors)

    def loss_fn(model, i):
        outputs = model(i)
        return (outputs.square() + outputs.sin()).mean()

    names = [k for k in shapes if k in adapted or adapted == "*"]
    meta = metafast.MAML(model, loss_fn, inner=SGD(lr=0.05), steps=2, adapt_parameters=adapted, **options)
    loss, found = meta_gradients(meta, INDEX, INDEX.flip(0))
    expected = query_losses(model, loss_fn, INDEX, INDEX.flip(0), 2, 0.05, names=names).mean()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, list(gradients(expected, model.parameters())))


def test_everything_is_put_back():
    before = {name: getattr(torch.Tensor, name) for name in METHODS}
    own = set(vars(torch.Tensor))
    functions = (torch.select_scatter, torch.max, torch.clamp)
    with metafast.accelerate(nn.Linear(2, 2)):
        assert torch.Tensor.max is not before["max"]
        assert torch.max is not functions[1]
        with metafast.accelerate(nn.Linear(2, 2)):
            pass
        assert torch.Tensor.max is not before["max"]
    assert {name: getattr(torch.Tensor, name) for name in METHODS} == before
    assert set(vars(torch.Tensor)) == own
    assert (torch.select_scatter, torch.max, torch.clamp) == functions


def test_other_threads_have_torchs_own():
    x = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)

    def derivative():
        return torch.autograd.grad(vmap(lambda x: x.max())(x).sum(), x)[0]

    found = []
    names = replaced_names(nn.Linear(2, 2))
    with accelerated_thread(names):
        thread = threading.Thread(target=lambda: found.append(derivative()))
        thread.start()
        thread.join()
        assert torch.equal(derivative(), torch.tensor([[0.5, 0.5, 0.0]]))
    assert torch.equal(found[0], derivative())
