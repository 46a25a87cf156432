"""The task-batched linear layer against torch's own, under every transform that reaches it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacfwd, jvp, vmap
from torch.utils import _pytree as pytree

from metafast.ops.linear import linear
from metafast.testing import relative_error


def draw(generator, *shapes):
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def loss(function):
    return lambda x, w, b: function(x, w, b).pow(3).sum()


TRANSFORMS = {
    "none": lambda f, x, w, b: f(x[0], w[0], b[0]),
    "vmap": lambda f, x, w, b: vmap(f)(x, w, b),
    "vmap, shared input": lambda f, x, w, b: vmap(f, (None, 0, 0))(x[0], w, b),
    "vmap, shared weight": lambda f, x, w, b: vmap(f, (0, None, None))(x, w[0], b[0]),
    "vmap, shared bias": lambda f, x, w, b: vmap(f, (0, 0, None))(x, w, b[0]),
    "vmap, bias alone": lambda f, x, w, b: vmap(f, (None, None, 0))(x[0], w[0], b),
    "vmap, other dimensions": lambda f, x, w, b: vmap(f, (1, 2, 1))(x.movedim(0, 1), w.movedim(0, 2), b.T),
    "vmap, no bias": lambda f, x, w, b: vmap(lambda x, w: f(x, w, None))(x, w),
    "vmap, one row": lambda f, x, w, b: vmap(f)(x[:, 0, 0], w, b),
    "grad": lambda f, x, w, b: grad(loss(f), (0, 1, 2))(x[0], w[0], b[0]),
    "vmap(grad)": lambda f, x, w, b: vmap(grad(loss(f), (0, 1, 2)))(x, w, b),
    "vmap(grad(grad))": lambda f, x, w, b: vmap(
        grad(lambda *a: sum(g.pow(2).sum() for g in grad(loss(f), (0, 1, 2))(*a)), (0, 1, 2))
    )(x, w, b),
    "vmap(jvp)": lambda f, x, w, b: vmap(lambda *a: jvp(f, a, tuple(t.cos() for t in a)))(x, w, b),
    "vmap(jacfwd(jacfwd))": lambda f, x, w, b: vmap(lambda *a: jacfwd(jacfwd(loss(f), 1), 0)(*a))(x, w, b),
    "jvp(grad)": lambda f, x, w, b: jvp(grad(loss(f), (0, 1, 2)), (x[0], w[0], b[0]), (x[1], w[1], b[1])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, generator: torch.Generator) -> None:
    inputs = draw(generator, (3, 2, 4, 5), (3, 6, 5), (3, 6))
    found, expected = (pytree.tree_leaves(TRANSFORMS[name](f, *inputs)) for f in (linear, F.linear))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-13


def test_second_order_by_autograd_beneath_vmap(generator: torch.Generator) -> None:
    """As the inner loop does it: vmap over the forward alone, ordinary autograd on what that recorded."""
    inputs = draw(generator, (3, 2, 4, 5), (3, 6, 5), (3, 6))
    results = []
    for function in (linear, F.linear):
        leaves = [x.clone().requires_grad_() for x in inputs]
        first = torch.autograd.grad(vmap(loss(function))(*leaves).sum(), leaves, create_graph=True)
        results.append((*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-13
