"""Embeddings of several tasks against each task alone, in float64."""

from __future__ import annotations

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree

import metafast
from metafast.testing import relative_error

pytestmark = pytest.mark.usefixtures("fused_cpu")
TASKS, ROWS, WIDTH = 3, 7, 4


class Words(nn.Module):
    """Logits of a bag of words; also looks its table up by ``torch.embedding``."""

    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, **options)
        self.own = nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        direct = torch.embedding(self.own.weight, ids, 2)
        return self.head((self.table(ids) * direct.tanh()).mean(-2))


def loss_fn(model, batch):
    ids, labels = batch
    return F.cross_entropy(model(ids), labels)


def batch(generator, examples):
    ids = torch.randint(0, ROWS, (TASKS, examples, 6), generator=generator)
    # Padding, and a row that is read more than once.
    ids[..., -1] = ROWS - 1
    ids[..., 0] = 0
    ids[..., 1] = ids[..., 2]
    return ids, torch.randint(0, 3, (TASKS, examples), generator=generator)


OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 0},
    "padding from the end": {"padding_idx": -1},
    "by frequency": {"scale_grad_by_freq": True},
    "by frequency, padding": {"scale_grad_by_freq": True, "padding_idx": 0},
    "sparse": {"sparse": True},
    "sparse, padding": {"sparse": True, "padding_idx": 0},
}
CASES = pytest.mark.parametrize("name", OPTIONS)


@pytest.mark.parametrize("adapt", [None, ["head.*", "own.*"]], ids=["all adapted", "table shared"])
@pytest.mark.parametrize(
    "learner",
    [
        {},
        {"order": 1},
        {"task_batching": "loop"},
        {"task_batching": "loop", "order": 1},
        {"capture": True},
        {"checkpoint": True},
    ],
    ids=str,
)
@CASES
def test_maml_is_the_plain_loop(name, learner, adapt, generator):
    model = Words(**OPTIONS[name]).double()
    support, query = batch(generator, 5), batch(generator, 4)
    names = None if adapt is None else [n for n, _ in model.named_parameters() if not n.startswith("table")]
    expected = plain_loop.query_losses(
        model, loss_fn, support, query, 2, 0.5, names=names, create_graph=learner.get("order", 2) == 2
    ).mean()
    gradients = [g.to_dense() for g in plain_loop.gradients(expected, model.parameters())]
    meta = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.5), steps=2, adapt_parameters=adapt, **learner)
    for _ in range(2):
        loss, found = plain_loop.meta_gradients(meta, support, query)
        assert abs(loss - expected) < 1e-12
        assert plain_loop.distance([g.to_dense() for g in found], gradients) < 1e-10


@CASES
def test_adapted_parameters_are_the_plain_loops(name, generator):
    model = Words(**OPTIONS[name]).double()
    support = batch(generator, 5)
    learners = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.5), steps=2).adapt(support)
    for task in range(TASKS):
        expected = plain_loop.adaptation(model, loss_fn, plain_loop.task(support, task), 2, 0.5)[-1]
        for key, value in expected.items():
            assert relative_error(learners.params[key][task], value) < 1e-10, key


def transforms(lookup):
    """Each takes tables and ids of two tasks and a direction."""

    def loss(weight, ids):
        return lookup(ids, weight).sin().pow(2).sum()

    def gradient_norm(weight, ids):
        return grad(loss)(weight, ids).pow(2).sum()

    return {
        "grad(vmap)": lambda w, ids, t: grad(lambda w: vmap(loss)(w, ids).sum())(w),
        "grad(vmap), shared table": lambda w, ids, t: grad(lambda w: vmap(loss, (None, 0))(w, ids).sum())(w[0]),
        "grad(vmap), shared ids": lambda w, ids, t: grad(lambda w: vmap(loss, (0, None))(w, ids[0]).sum())(w),
        "vmap(grad)": lambda w, ids, t: vmap(grad(loss))(w, ids),
        "vmap(grad(grad))": lambda w, ids, t: vmap(grad(gradient_norm))(w, ids),
        "grad(vmap(grad))": lambda w, ids, t: grad(lambda w: vmap(gradient_norm)(w, ids).sum())(w),
        "jvp(vmap(grad))": lambda w, ids, t: jvp(lambda w: vmap(grad(loss))(w, ids), (w,), (t,))[1],
        "vmap(jvp)": lambda w, ids, t: vmap(lambda w, ids, t: jvp(lambda w: loss(w, ids), (w,), (t,)))(w, ids, t),
    }


@pytest.mark.parametrize("transform", transforms(None))
@pytest.mark.parametrize("padding", [None, 0, -1])
def test_transforms(padding, transform, generator):
    """Against a table whose padding row is cut off by hand."""
    weight, direction = (torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in "12")
    ids = torch.randint(0, ROWS, (2, 5, 3), generator=generator)
    ids[:, 0] = 0

    def by_hand(ids, weight):
        if padding is None:
            return weight[ids]
        kept = (torch.arange(ROWS) != padding % ROWS).unsqueeze(-1)
        return torch.where(kept, weight, weight.detach())[ids]

    with metafast.accelerate(Words()):
        found = transforms(lambda ids, weight: F.embedding(ids, weight, padding))[transform](weight, ids, direction)
    expected = transforms(by_hand)[transform](weight, ids, direction)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-12


def test_frequencies_are_each_tasks_own(generator):
    """A table that tasks share, and tables in half types that many large ids would overflow."""
    ids = torch.randint(0, 5000, (TASKS, 400), generator=generator)
    for dtype in (torch.float64, torch.float16):
        weight = torch.randn(5000, 2, generator=generator).to(dtype).requires_grad_()

        def loss(ids, weight=weight):
            return F.embedding(ids, weight, scale_grad_by_freq=True).pow(2).sum()

        with metafast.accelerate(Words()):
            (found,) = torch.autograd.grad(vmap(loss)(ids).sum(), weight)
        (expected,) = torch.autograd.grad(sum(loss(own) for own in ids), weight)
        assert relative_error(found, expected) < (1e-12 if dtype == torch.float64 else 1e-3)


def test_a_leaf_keeps_its_sparse_gradient(generator):
    model = Words(sparse=True)
    ids = torch.randint(0, ROWS, (2, 5), generator=generator)
    with metafast.accelerate(model):
        model(ids).sum().backward()
        assert model.table.weight.grad.is_sparse
        computed = {"table.weight": model.table.weight * 2}
        (dense,) = torch.autograd.grad(functional_call(model, computed, (ids,)).sum(), computed["table.weight"])
    assert not dense.is_sparse


def test_names_are_put_back():
    before = torch.embedding
    with metafast.accelerate(Words()):
        assert torch.embedding is not before
    assert torch.embedding is before
