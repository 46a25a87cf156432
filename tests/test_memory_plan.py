"""``checkpoint="auto"`` and ``tasks_per_chunk="auto"``: what they choose, and that it changes no number."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from held_memory import held_bytes
from plain_loop import distance, gradients, meta_gradients, query_losses
from torch import nn

import metafast
from metafast.engine import memory_budget, memory_plan
from metafast.engine.autograd_graph import graph_bytes
from metafast.inner import SGD, Adam
from metafast.measure import peak_memory

TASKS, STEPS, LR = 4, 3, 0.1


def mlp(width=6):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def draw(shots, tasks=TASKS):
    return tuple(torch.randn(tasks, shots, size, dtype=torch.float64) for size in (3, 2))


def maml(net, **options):
    return metafast.MAML(net, loss_fn, **{"inner": SGD(lr=LR), "steps": STEPS, **options})


@pytest.fixture
def net(generator):
    return mlp()


@pytest.fixture
def large_tensors(monkeypatch):
    """Any tensor counts as large."""
    monkeypatch.setattr(memory_plan, "LARGE_PARAMETERS", 0)
    monkeypatch.setitem(memory_plan.LARGE_GRAPH, "cpu", 1)


def of_one_step(net, support, query, **options):
    """Bytes of the graph of a step of one task, and of the parameters of one."""
    meta = maml(net, **options)
    meta(support, query)
    own = sum(p.nbytes for p in net.parameters()) * (1 + len(meta.inner.state_names))
    return meta.outcome.memory.graph_bytes, own


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class KeepsAnAttribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.factor = 2 * x
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor


def test_the_bytes_of_a_graph_are_those_that_hooks_see(generator):
    net = nn.Sequential(mlp(50), nn.LayerNorm(2), nn.GELU(), nn.Linear(2, 300)).double()
    x = torch.randn(40, 3, dtype=torch.float64)

    def gradient():
        return torch.autograd.grad(net(x).square().mean(), list(net.parameters()), create_graph=True)

    held = held_bytes(gradient)
    assert graph_bytes(gradient(), []) == held
    weights = [p for p in net.parameters() if p.dim() == 2]
    # The first layer's weight is not held: nothing is differentiated by the input.
    assert graph_bytes(gradient(), [x, *net.parameters()]) <= held - x.nbytes - sum(p.nbytes for p in weights[1:])


def test_graphs_of_all_steps_take_as_much_as_that_of_the_first_one_each(net):
    batches = draw(64), draw(1)
    meta = maml(net, steps=6)
    meta(*batches)  # measured without the hooks, which would seem to keep nothing
    held = held_bytes(lambda: meta(*batches))
    assert held == pytest.approx(6 * TASKS * meta.outcome.memory.graph_bytes, rel=0.25)


def test_the_bytes_of_a_graph_that_are_hidden(generator):
    x = torch.randn(100, 3, dtype=torch.float64, requires_grad=True)
    assert graph_bytes([KeepsAnAttribute.apply(x)], [x]) == x.nbytes
    calls = []
    net = Checkpointed(nn.Linear(3, 50), nn.Tanh()).double()
    net[0].register_forward_hook(lambda *_: calls.append(1))
    # What the model computes again is not held, and not computed again to be counted.
    assert graph_bytes([net(x)], [x, *net.parameters()]) == 0
    assert calls == [1]


@pytest.mark.parametrize("kept", range(STEPS + 1))
@pytest.mark.parametrize("options", [{}, {"capture": True}, {"task_batching": "loop"}, {"micro_batches": 2}], ids=str)
def test_as_many_graphs_are_kept_as_the_budget_allows(net, caplog, kept, options):
    support, query = draw(4), draw(5)
    graph, own = of_one_step(net, support, query, tasks_per_chunk=None, **options)
    budget = TASKS * (max(kept, 1) * graph + (STEPS - kept) * own)
    meta = maml(net, memory_budget=budget, tasks_per_chunk=None, **options)
    with caplog.at_level(logging.INFO, "metafast"):
        for _ in range(2):
            batches = draw(4), draw(5)
            expected = query_losses(net, loss_fn, *batches, STEPS, LR).mean()
            loss, found = meta_gradients(meta, *batches)
            assert distance([loss, *found], [expected, *gradients(expected, net.parameters())]) < 1e-9
            # One rebuilt graph is held at a time as well as one kept graph is.
            assert meta.outcome.memory.kept_steps == max(kept, 1)
            assert meta.outcome.memory.budget_bytes == budget
    assert caplog.text.count("of 3 inner steps keep their graphs") == 1


@pytest.mark.parametrize("rule", [SGD(lr=LR, momentum=0.9), Adam(lr=0.1, eps=0.1)], ids=str)
@pytest.mark.parametrize("step_weights", [None, [0.2, 0.3, 0.5]])
def test_states_and_losses_of_every_step(net, rule, step_weights):
    support, query = metafast.PerStep([draw(4) for _ in range(STEPS)]), draw(5)
    options = {"inner": rule, "step_weights": step_weights, "tasks_per_chunk": None}
    graph, own = of_one_step(net, support, query, **options)
    expected = meta_gradients(maml(net, checkpoint=False, **options), support, query)
    meta = maml(net, memory_budget=TASKS * (2 * graph + own), **options)
    found = meta_gradients(meta, support, query)
    assert meta.outcome.memory.kept_steps == 2
    assert distance([found[0], *found[1]], [expected[0], *expected[1]]) < 1e-10


def test_fewer_tasks_run_side_by_side_before_graphs_are_rebuilt(net, large_tensors):
    support, query = draw(4), draw(5)
    graph, own = of_one_step(net, support, query)
    expected = meta_gradients(maml(net, tasks_per_chunk=None), support, query)
    cases = {
        TASKS * STEPS * graph: (1, STEPS),  # each task is large enough by itself
        2 * graph + own: (1, 2),
        1: (1, 0),
    }
    for budget, choice in cases.items():
        meta = maml(net, memory_budget=budget)
        found = meta_gradients(meta, support, query)
        assert meta.outcome.memory[:2] == choice
        assert distance([found[0], *found[1]], [expected[0], *expected[1]]) < 1e-10


def test_small_tasks_run_side_by_side_as_far_as_they_fit(net):
    support, query = draw(4), draw(5)
    graph, own = of_one_step(net, support, query)
    expected = meta_gradients(maml(net, tasks_per_chunk=None), support, query)
    # Below 64 MiB, tasks side by side are faster than graphs that are kept.
    for budget, choice in {
        TASKS * STEPS * graph: (TASKS, STEPS),
        TASKS * (graph + 2 * own): (TASKS, 1),
        1: (1, 0),
    }.items():
        meta = maml(net, memory_budget=budget)
        found = meta_gradients(meta, support, query)
        assert meta.outcome.memory[:2] == choice
        assert distance([found[0], *found[1]], [expected[0], *expected[1]]) < 1e-10


def test_options_of_the_user_stand(net, large_tensors):
    batches = draw(4), draw(5)
    for options, choice in (
        ({"checkpoint": False}, (1, STEPS)),
        ({"checkpoint": True}, (1, 0)),
        ({"tasks_per_chunk": 3}, (3, 0)),
        ({"tasks_per_chunk": None}, (TASKS, 0)),
    ):
        meta = maml(net, memory_budget=1, **options)
        meta(*batches)
        assert meta.outcome.memory[:2] == choice
    meta = maml(net, memory_budget=1, checkpoint=True, tasks_per_chunk=2)
    meta(*batches)
    assert meta.outcome.memory is None


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"capture": True}, {"task_batching": "loop"}], ids=str)
def test_large_tasks_run_in_chunks(net, large_tensors, caplog, options):
    batches = draw(4), draw(4)
    expected = meta_gradients(maml(net, tasks_per_chunk=None), *batches)
    meta = maml(net, **options)
    with caplog.at_level(logging.INFO, "metafast"):
        for _ in range(2):
            loss, found = meta_gradients(meta, *batches)
            assert distance([loss, *found], [expected[0], *expected[1]]) < 1e-10
    assert caplog.text.count(f"1 of {TASKS} tasks run side by side") == 1
    assert caplog.text.count("recorded") == (1 if options.get("capture") else 0)


def test_as_many_side_by_side_as_are_small(net, large_tensors, monkeypatch):
    batches = draw(4), draw(4)
    graph, _ = of_one_step(net, *batches)
    for large, number in ((graph + 1, 2), (10**9, TASKS)):
        monkeypatch.setitem(memory_plan.LARGE_GRAPH, "cpu", large)
        meta = maml(net)
        meta(*batches)
        assert meta.outcome.memory.tasks_per_chunk == number


def test_what_cannot_run_in_chunks_runs_side_by_side(net, large_tensors, caplog):
    """Inputs that require a gradient, running statistics, and tensors that are no parameters."""
    support, query = draw(4), draw(4)
    support[0].requires_grad_()
    expected = torch.autograd.grad(maml(net, tasks_per_chunk=None)(support, query), support[0])
    assert distance(torch.autograd.grad(maml(net)(support, query), support[0]), expected) < 1e-10
    support[0].requires_grad_(False)

    normed = nn.Sequential(copy.deepcopy(net), nn.BatchNorm1d(2).double())
    assert maml(normed).memory_plan.tasks_per_chunk(support, query, TASKS) == TASKS
    assert maml(net, order=1).memory_plan.tasks_per_chunk(support, query, TASKS) == TASKS

    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    meta = metafast.MAML(net, lambda model, batch: factor * loss_fn(model, batch), inner=SGD(lr=0.1), steps=2)
    with caplog.at_level(logging.INFO, "metafast"):
        meta(support, query).backward()
    assert factor.grad is not None
    assert meta.tasks_per_chunk is None
    assert "all tasks run side by side" in caplog.text


def test_smaller_batches_are_not_measured_again(net, caplog):
    meta = maml(net)
    with caplog.at_level(logging.INFO, "metafast"):
        for shots in (6, 4, 5, 6, 3):
            meta(draw(shots), draw(5)).backward()
        assert caplog.text.count("the graph of an inner step takes about") == 1
        meta(draw(7), draw(5)).backward()
    assert caplog.text.count("the graph of an inner step takes about") == 2


def test_the_model_is_called_no_more_often_than_without(net):
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    maml(net, checkpoint=False, tasks_per_chunk=None)(draw(4), draw(5)).backward()
    expected = len(calls)
    calls.clear()
    maml(net)(draw(4), draw(5)).backward()
    assert len(calls) == expected


def test_the_budget_is_kept(generator):
    net = mlp(256)
    batches = draw(200), draw(200)
    graph, own = of_one_step(net, *batches)
    # Graphs are not all: the backward pass makes tensors as large as those of a graph.
    others = peak_memory(lambda: maml(net, steps=1, checkpoint=False)(*batches).backward()) - TASKS * graph
    for budget in (TASKS * (2 * graph + own), TASKS * (graph + 2 * own)):
        meta = maml(net, memory_budget=budget)
        meta(*batches).backward()
        assert peak_memory(lambda meta=meta: meta(*batches).backward()) <= 1.1 * (budget + others)
    everything = peak_memory(lambda: maml(net, checkpoint=False)(*batches).backward())
    assert everything > 1.5 * budget


def test_the_budget_is_half_of_the_free_memory(net, monkeypatch):
    monkeypatch.setattr(memory_budget, "free_bytes", lambda device: 1000)
    for given, expected in ((None, 500), (0.25, 250), (123, 123)):
        meta = maml(net, memory_budget=given)
        meta(draw(4), draw(5))
        assert meta.outcome.memory.budget_bytes == expected
    monkeypatch.setattr(memory_budget, "free_bytes", lambda device: None)
    meta = maml(net)
    meta(draw(4), draw(5))
    assert meta.outcome.memory[1::2] == (STEPS, None)


def test_free_memory_is_known_here():
    free = memory_budget.free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 2**50
