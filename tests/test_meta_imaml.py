"""iMAML against the implicit gradient from dense Hessians, and against unrolling until nothing changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_loop import distance, gradients, meta_gradients, task
from torch import nn
from torch.func import functional_call

import metafast
from metafast.inner import SGD

# λ is above the largest eigenvalue of these Hessians, as the Neumann series needs.
TASKS, PROXIMAL = 3, 20.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.fixture
def net(generator):
    return Net().double()


@pytest.fixture
def batches(generator):
    return [
        tuple(torch.randn(TASKS, shots, n, generator=generator, dtype=torch.float64) for n in (3, 1))
        for shots in (6, 8)
    ]


def unrolled(net, support, query, names, steps=60, lr=0.04):
    """The meta-loss with the graph of a long inner loop: its derivative is that of the minimum."""
    losses = []
    for index in range(TASKS):
        start = dict(net.named_parameters())
        params = dict(start)
        for _ in range(steps):
            loss = loss_fn(lambda x, p=params: functional_call(net, p, (x,)), task(support, index))
            loss = loss + PROXIMAL / 2 * sum((params[n] - start[n]).pow(2).sum() for n in names)
            grads = torch.autograd.grad(loss, [params[n] for n in names], create_graph=True)
            params = {**params, **{n: params[n] - lr * g for n, g in zip(names, grads, strict=True)}}
        losses.append(loss_fn(lambda x, p=params: functional_call(net, p, (x,)), task(query, index)))
    return torch.stack(losses).mean()


def imaml(net, **options):
    return metafast.IMAML(net, loss_fn, **{"inner": SGD(lr=0.04), "steps": 60, "proximal": PROXIMAL, **options})


@pytest.mark.parametrize("options", [{"solver": "cg", "solver_steps": 30}, {"solver": "neumann", "solver_steps": 60}])
@pytest.mark.parametrize("names", [None, ["head.weight", "head.bias"]])
def test_at_the_minimum_it_is_the_derivative_of_the_minimum(net, batches, names, options):
    chosen = names or [name for name, _ in net.named_parameters()]
    loss = unrolled(net, *batches, chosen)
    found_loss, found = meta_gradients(imaml(net, adapt_parameters=names, **options), *batches)
    assert abs(found_loss - loss) < 1e-9
    assert distance(found, gradients(loss, net.parameters())) < 1e-6


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_anywhere_it_solves_the_papers_linear_system(net, batches, solver):
    """After few inner steps too, lemma 1's formula at φ: with a dense Hessian and a dense solve, task by task."""
    support, query = batches
    meta = imaml(net, steps=3, solver=solver, solver_steps=21, proximal=50.0)
    _, found = meta_gradients(meta, support, query)
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]

    def value(flat, batch):
        params = {n: v.view(s) for n, v, s in zip(names, flat.split(sizes), shapes, strict=True)}
        return loss_fn(lambda x: functional_call(net, params, (x,)), batch)

    solutions = []
    for index in range(TASKS):
        phi = torch.cat([meta.adapt(support).params[name][index].flatten() for name in names])
        hessian = torch.autograd.functional.hessian(lambda v, i=index: value(v, task(support, i)), phi)
        b = torch.autograd.functional.jacobian(lambda v, i=index: value(v, task(query, i)), phi)
        solutions.append(torch.linalg.solve(torch.eye(len(phi)) + hessian / 50.0, b))
    expected = torch.stack(solutions).mean(0)
    assert distance([torch.cat([g.flatten() for g in found])], [expected]) < 1e-9


def test_inner_loop_minimises_the_proximal_loss(net, batches):
    """A stationary point of L̂ + λ/2‖φ − θ‖², and nearer to θ the larger λ is."""
    support, _ = batches
    distances = []
    for proximal in (10.0, 30.0):
        params = imaml(net, proximal=proximal).adapt(support).params
        at = {name: p[1].clone().requires_grad_() for name, p in params.items()}
        loss = loss_fn(lambda x, p=at: functional_call(net, p, (x,)), task(support, 1))
        grads = gradients(loss, at.values())
        for (name, p), grad in zip(at.items(), grads, strict=True):
            residual = grad + proximal * (p - net.get_parameter(name))
            assert residual.detach().abs().max() < 1e-6
        distances.append(sum((p - net.get_parameter(n)).pow(2).sum() for n, p in at.items()).item())
    assert distances[1] < distances[0]


def test_weights_chunks_and_evaluation(net, batches):
    weights = torch.tensor([1.0, 3.0, 2.0])
    expected_loss, expected = meta_gradients(imaml(net, steps=5), *batches, task_weights=weights)
    loss, found = meta_gradients(imaml(net, steps=5, tasks_per_chunk=2), *batches, task_weights=weights)
    assert abs(loss - expected_loss) < 1e-12
    assert distance(found, expected) < 1e-12
    with torch.no_grad():
        evaluated = imaml(net, steps=5)(*batches, task_weights=weights)
    torch.testing.assert_close(evaluated, expected_loss)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"proximal": 0}, ValueError, "proximal: expected a number above 0, got 0"),
        ({"proximal": "big"}, TypeError, "proximal: expected a number, got str"),
        ({"solver": "lu"}, ValueError, "solver: expected one of 'cg', 'neumann', got 'lu'"),
        ({"solver_steps": -1}, ValueError, "solver_steps: expected at least 0, got -1"),
        ({"inner": SGD(lr=0.1, learn="lr")}, ValueError, "inner: iMAML has no gradient for rates; expected none"),
    ],
)
def test_bad_arguments(net, options, error, message):
    with pytest.raises(error, match=message):
        imaml(net, **options)


def test_one_support_set(net, batches):
    with pytest.raises(TypeError, match="support: iMAML minimises one loss, expected one support set, got PerStep"):
        imaml(net)(metafast.PerStep([batches[0]] * 400), batches[1])
