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


ADAPTED = {"all": (0, 1, 2), "no bias": (0, 1), "weight": (1,), "bias": (2,), "input": (0,), "weight and bias": (1, 2)}


@pytest.mark.parametrize("name", ADAPTED)
def test_second_order_by_autograd_beneath_vmap(name: str, generator: torch.Generator) -> None:
    """As the inner loop does it: vmap over the forward alone, ordinary autograd on what that recorded."""
    inputs = draw(generator, (3, 2, 4, 5), (3, 6, 5), (3, 6))
    results = []
    for function in (linear, F.linear):
        leaves = [x.clone().requires_grad_(i in ADAPTED[name]) for i, x in enumerate(inputs)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(vmap(loss(function))(*leaves).sum(), wanted, create_graph=True)
        for seconds in (first, first[:1], first[-1:]):
            total = sum(g.pow(2).sum() for g in seconds)
            results.append((*first, *torch.autograd.grad(total, wanted, retain_graph=True)))
    for found, expected in zip(results[:3], results[3:], strict=True):
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_to_third_order_beneath_vmap(has_bias: bool, generator: torch.Generator) -> None:
    inputs = [x.requires_grad_() for x in draw(generator, (2, 2, 3), (2, 2, 3), (2, 2))[: 2 + has_bias]]

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        return vmap(linear)(*leaves).tanh()

    def gradient(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Checks of forward mode call it without gradients.
        leaves = tuple(x if x.requires_grad else x.requires_grad_() for x in leaves)
        return torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(gradient, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(gradient, inputs, check_batched_grad=True)


def test_autocast(generator: torch.Generator) -> None:
    """Beneath vmap: types and numbers of torch's own, a task after the other, to second order. (Its vmap does not cast.)"""

    def loop(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.linear(*one) for one in zip(x, w, b, strict=True)])

    results = []
    for function in (vmap(linear), loop):
        generator.manual_seed(0)
        x, w, b = (t.float().requires_grad_() for t in draw(generator, (3, 2, 4, 5), (3, 6, 5), (3, 6)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(x, w, b)
            assert out.dtype == torch.bfloat16
            first = torch.autograd.grad(out.float().pow(2).sum(), (x, w, b), create_graph=True)
        results.append((out, *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, w, b))))
    for a, expected in zip(*results, strict=True):
        assert a.dtype == expected.dtype
        assert relative_error(a, expected) < 2e-2
