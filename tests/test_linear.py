"""The task-batched linear layer against torch's own, under every transform that reaches it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacfwd, jvp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import metafast
from metafast.backend import extension
from metafast.ops.layers.linear import linear
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


@pytest.mark.parametrize("rows", [(4,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("tasks", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, tasks: int, rows: tuple, generator: torch.Generator) -> None:
    """To second order as close to float64 as torch is, one task after the other; whichever computes the products."""
    lead = (tasks,) if tasks else ()
    drawn = draw(generator, (*lead, *rows, 40), (*lead, 24, 40), (*lead, 24))
    weights = draw(generator, (*lead, *rows, 24), *(t.shape for t in drawn))

    def loop(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.linear(*one) for one in zip(*inputs, strict=True)]) if tasks else F.linear(*inputs)

    results = []
    for function, of in ((loop, torch.float64), (loop, dtype), (vmap(linear) if tasks else linear, dtype)):
        # What is rounded to the smaller type is the same for all.
        inputs = [t.to(dtype).to(of).requires_grad_() for t in drawn]
        out = function(*inputs)
        of_out, *of_grads = (w.to(dtype).to(of) for w in weights)
        first = torch.autograd.grad(out, inputs, of_out, create_graph=True)
        second = torch.autograd.grad(first[:2], inputs[:2], of_grads[:2])
        assert all(t.dtype == of for t in (out, *first, *second))
        results.append([t.detach().double() for t in (out, *first, *second)])
    for exact, theirs, ours in zip(*results, strict=True):
        assert relative_error(ours, exact) <= max(2 * relative_error(theirs, exact), torch.finfo(dtype).eps)


# Tasks, rows, columns and the depths of each product: whole and broken blocks, none, more than is laid out at a time.
SIZES = [
    (1, 1, 1, (1,)),
    (3, 7, 5, (3, 0)),
    (2, 33, 16, (40, 5)),
    (4, 10, 5, (64,)),
    (2, 13, 300, (270, 7, 1)),
    (5, 6, 17, (300,)),
    (3, 200, 48, (32, 64)),
    (2, 4, 6, (0,)),
    (0, 3, 4, (5,)),
    (2, 0, 4, (5,)),
]
STARTS = {
    "none": lambda *shape: None,
    "a row": lambda tasks, rows, columns: (tasks, 1, columns),
    "rows": lambda *shape: shape,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel(size: tuple, start: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Against float64, however the factors lie; bit by bit the same into given memory, and over what is added to."""
    op = kernel()
    tasks, rows, columns, depths = size
    (plain,) = draw(generator, STARTS[start](tasks, rows, columns)) if start != "none" else (None,)
    added = None if plain is None else plain.to(dtype)
    for transposed in (False, True):
        lefts = [x.to(dtype) for x in draw(generator, *((tasks, rows, depth) for depth in depths))]
        rights = [x.to(dtype) for x in draw(generator, *((tasks, depth, columns) for depth in depths))]
        if transposed:
            lefts, rights = ([x.mT.contiguous().mT for x in factors] for factors in (lefts, rights))
        exact = sum(a.double() @ b.double() for a, b in zip(lefts, rights, strict=True))
        size_of = sum(a.double().abs() @ b.double().abs() for a, b in zip(lefts, rights, strict=True))
        if added is not None:
            exact, size_of = exact + added.double(), size_of + added.double().abs()
        found = op(added, lefts, rights)
        assert found.shape == (tasks, rows, columns)
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= 4 * (1 + max(depths)) ** 0.5 * torch.finfo(dtype).eps * size_of).all()
        given = torch.full_like(found, torch.nan)
        op.out(added, lefts, rights, out0=given)
        assert torch.equal(given, found)
        if start == "rows":
            over = added.clone()
            op.out(over, lefts, rights, out0=over)
            assert torch.equal(over, found)
    if found.numel():
        torch.library.opcheck(op.default, (added, lefts, rights), test_utils=("test_schema", "test_faketensor"))


def test_kernel_writes_nothing_beside_its_result(generator: torch.Generator) -> None:
    op = kernel()
    x, w, whole = (t.float() for t in draw(generator, (2, 5, 9), (2, 9, 3), (2, 7, 40)))
    before = whole.clone()
    result = whole[:, 1:6, 11:14]
    op.out(None, [x], [w], out0=result)
    assert relative_error(result, x @ w) < 1e-6
    result.copy_(before[:, 1:6, 11:14])
    assert torch.equal(whole, before)


@pytest.mark.parametrize(
    ("start", "left", "right"),
    [
        (None, (2, 3, 4), (2, 5, 6)),
        (None, (2, 3, 4), (3, 4, 6)),
        ((2, 2, 6), (2, 3, 4), (2, 4, 6)),
        (None, (3, 4), (4, 6)),
    ],
)
def test_kernel_refuses_other_shapes(start: tuple | None, left: tuple, right: tuple) -> None:
    with pytest.raises(RuntimeError, match="sum_of_products"):
        kernel()(None if start is None else torch.zeros(start), [torch.zeros(left)], [torch.zeros(right)])


def test_takes_the_kernel_or_torchs_products(generator: torch.Generator) -> None:
    """The kernel beneath autograd; the reference backend torch's own: the same values and derivatives of both orders."""
    kernel()
    inputs = draw(generator, (3, 8, 5), (3, 6, 5), (3, 6))
    results, names = [], []
    for backend in ("fused", "reference"):
        with metafast.use_backend(backend), profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = vmap(linear)(*leaves)
            first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
            results.append((out, *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)))
        names.append([event.name for event in recorded.events()])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-13
    assert names[0].count("metafast::sum_of_products") == 5
    assert "metafast::sum_of_products" not in names[1]


def kernel() -> Any:
    if extension() is None:
        pytest.skip("the extension is not built")
    return torch.ops.metafast.sum_of_products


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_half_types_of_no_rows(shape: tuple) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16)
    assert linear(x, torch.ones(3, 4, dtype=torch.bfloat16)).shape == (*shape[:-1], 3)


@pytest.mark.parametrize(
    "types",
    [("bfloat16", "float32", "float32"), ("float16", "bfloat16", "bfloat16"), ("bfloat16", "bfloat16", "float32")],
)
def test_refuses_the_types_that_torch_refuses(types: tuple) -> None:
    x, weight, bias = (
        torch.ones(shape, dtype=getattr(torch, t)) for shape, t in zip(((2, 4), (3, 4), (3,)), types, strict=True)
    )
    for function in (linear, F.linear):
        with pytest.raises(RuntimeError):
            function(x, weight, bias)
