"""Layer normalisation, its relatives and GELU as accelerate swaps them in, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.utils import _pytree as pytree

import metafast
from metafast.ops.layers.gelu import gelu
from metafast.ops.layers.layer_norm import layer_norm
from metafast.ops.layers.rms_norm import rms_norm
from metafast.testing import relative_error

pytestmark = pytest.mark.usefixtures("fused_cpu")


def norm(x, weight, bias):
    return layer_norm(x, weight.shape, weight, bias, 1e-5)


def torchs_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def composed_norm(x, weight=None, bias=None, dims=-1, eps=1e-5):
    """Of elementary operations: torch's own is wrong in forward mode and in the third derivative."""
    centred = x - x.mean(dims, keepdim=True)
    return composed_rms_norm(centred, weight, dims, eps) + (0 if bias is None else bias)


def composed_rms_norm(x, weight=None, dims=-1, eps=2.0**-52):
    return x / (x.pow(2).mean(dims, keepdim=True) + eps).sqrt() * (1 if weight is None else weight)


# Ours, torch's, and the shapes of the arguments, without tasks.
OPS = {
    "gelu": (gelu, F.gelu, ((3, 5, 7),)),
    "layer norm": (norm, torchs_norm, ((3, 5, 7), (7,), (7,))),
    "layer norm of many rows": (norm, torchs_norm, ((300, 16), (16,), (16,))),
    "layer norm of a row": (norm, torchs_norm, ((9,), (9,), (9,))),
    "layer norm of nothing": (norm, torchs_norm, ((0, 5), (5,), (5,))),
    "layer norm without bias": (
        lambda x, weight: layer_norm(x, (7,), weight),
        lambda x, weight: F.layer_norm(x, (7,), weight),
        ((3, 5, 7), (7,)),
    ),
    "layer norm without weight": (
        lambda x, bias: layer_norm(x, (7,), None, bias, 0.1),
        # Torch does not differentiate this twice as one call.
        lambda x, bias: F.layer_norm(x, (7,), eps=0.1) + bias,
        ((3, 5, 7), (7,)),
    ),
    "layer norm alone": (lambda x: layer_norm(x, (7,)), lambda x: F.layer_norm(x, (7,)), ((3, 5, 7),)),
    "layer norm of two dimensions": (norm, torchs_norm, ((3, 5, 7), (5, 7), (5, 7))),
    "layer norm of two dimensions alone": (
        lambda x: layer_norm(x, (5, 7)),
        lambda x: F.layer_norm(x, (5, 7)),
        ((3, 5, 7),),
    ),
    "layer norm of all dimensions": (norm, torchs_norm, ((5, 7), (5, 7), (5, 7))),
    "rms norm": (
        lambda x, weight: rms_norm(x, (7,), weight),
        lambda x, weight: F.rms_norm(x, (7,), weight),
        ((3, 5, 7), (7,)),
    ),
    "rms norm of two dimensions": (
        lambda x, weight: rms_norm(x, (5, 7), weight, 0.1),
        lambda x, weight: F.rms_norm(x, (5, 7), weight, 0.1),
        ((3, 5, 7), (5, 7)),
    ),
    "rms norm alone": (lambda x: rms_norm(x, (7,)), lambda x: F.rms_norm(x, (7,)), ((3, 5, 7),)),
}
# The same of elementary operations.
COMPOSED = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "layer norm": composed_norm,
    "layer norm without bias": composed_norm,
    "layer norm without weight": lambda x, bias: composed_norm(x, None, bias, eps=0.1),
    "layer norm alone": composed_norm,
    "layer norm of two dimensions": lambda x, weight, bias: composed_norm(x, weight, bias, (-1, -2)),
    "layer norm of two dimensions alone": lambda x: composed_norm(x, dims=(-1, -2)),
    "rms norm": composed_rms_norm,
    "rms norm of two dimensions": lambda x, weight: composed_rms_norm(x, weight, (-1, -2), 0.1),
    "rms norm alone": composed_rms_norm,
}
CASES = pytest.mark.parametrize("name", OPS)


def drawn(shapes, generator, dtype=torch.float64, tasks=()):
    return tuple(torch.randn((*tasks, *shape), generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def second_order(function, inputs, cotangents, create_graph=False):
    """Output, gradients and second derivatives; with create_graph the way that may go on to the third."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    grad_out = cotangents[0].reshape(out.shape).to(out).requires_grad_()
    grads = torch.autograd.grad(out, inputs, grad_out, create_graph=True)
    directions = [c.reshape(g.shape).to(g) for c, g in zip(cotangents, grads, strict=True)]
    seconds = torch.autograd.grad(grads, [*inputs, grad_out], directions, create_graph, materialize_grads=True)
    return [out, *grads, *(x for x in seconds)]


@pytest.mark.parametrize("create_graph", [False, True])
@CASES
def test_to_second_order(name, create_graph, generator):
    ours, torchs, shapes = OPS[name]
    inputs, cotangents = drawn(shapes, generator), drawn(shapes, generator)
    found, expected = (second_order(f, inputs, cotangents, create_graph) for f in (ours, torchs))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-11


@CASES
def test_float32_is_as_good_as_torch(name, generator):
    ours, torchs, shapes = OPS[name]
    inputs, cotangents = drawn(shapes, generator, torch.float32), drawn(shapes, generator, torch.float32)
    exact = second_order(torchs, [x.double() for x in inputs], cotangents)
    found, eager = (second_order(f, inputs, cotangents) for f in (ours, torchs))
    for a, b, e in zip(found, eager, exact, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, e) <= 2 * relative_error(b, e) + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@CASES
def test_tasks_side_by_side(name, layout, generator):
    """vmap over the forward, ordinary autograd beneath: every task as if it were alone."""
    ours, torchs, shapes = OPS[name]
    inputs, cotangents = drawn(shapes, generator, tasks=(3,)), drawn(shapes, generator, tasks=(3,))
    if layout == "transposed":
        inputs = tuple(x.movedim(0, -1).contiguous().movedim(-1, 0) for x in inputs)
    found = second_order(vmap(ours), inputs, cotangents)
    for task in range(3):
        expected = second_order(torchs, [x[task] for x in inputs], [c[task] for c in cotangents])
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a[task], b) < 1e-11


def transforms(op, shapes):
    """Each takes arguments for two tasks and directions."""
    indices = tuple(range(len(shapes)))

    def loss(*x):
        return op(*x).pow(3).sum()

    def gradient_norm(*x):
        return sum(g.pow(2).sum() for g in grad(loss, indices)(*x))

    def dual_level(x, t):
        """Forward mode without functorch, over tasks side by side."""
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(y.clone().requires_grad_(), d) for y, d in zip(x, t, strict=True)]
            grads = torch.autograd.grad(vmap(loss)(*duals).sum(), duals, create_graph=True)
            return [forward_ad.unpack_dual(g).tangent.detach() for g in grads]

    return {
        "grad": lambda x, t: grad(loss, indices)(*(y[0] for y in x)),
        "vmap(grad)": lambda x, t: vmap(grad(loss, indices))(*x),
        "vmap(vmap)": lambda x, t: vmap(vmap(op))(*(y.expand(2, *y.shape) for y in x)),
        "vmap(grad), first argument shared": lambda x, t: (
            vmap(grad(loss, indices), (None, *(0,) * (len(x) - 1)))(x[0][0], *x[1:]) if len(x) > 1 else x
        ),
        "vmap(grad), others shared": lambda x, t: vmap(grad(loss, indices), (0, *(None,) * (len(x) - 1)))(
            x[0], *(y[0] for y in x[1:])
        ),
        "vmap(grad(grad))": lambda x, t: vmap(grad(gradient_norm, indices))(*x),
        "third": lambda x, t: grad(lambda *x: sum((g * 1e-4).sin().sum() for g in grad(gradient_norm, indices)(*x)), 0)(
            *(y[0] for y in x)
        ),
        "jvp": lambda x, t: jvp(loss, tuple(y[0] for y in x), tuple(y[0] for y in t)),
        "jvp(grad)": lambda x, t: jvp(grad(loss, indices), tuple(y[0] for y in x), tuple(y[0] for y in t)),
        "vmap(jvp(grad))": lambda x, t: vmap(lambda x, t: jvp(grad(loss, indices), x, t))(x, t),
        "jvp(vmap(grad))": lambda x, t: jvp(vmap(grad(loss, indices)), x, t),
        "jvp(vmap(grad)), others shared": lambda x, t: jvp(
            lambda *x: vmap(grad(loss, indices), (0, *(None,) * (len(x) - 1)))(*x),
            (x[0], *(y[0] for y in x[1:])),
            (t[0], *(y[0] for y in t[1:])),
        ),
        "jvp(grad(vmap))": lambda x, t: jvp(grad(lambda *x: vmap(loss)(*x).sum(), indices), x, t),
        "grad(jvp)": lambda x, t: grad(lambda *x: jvp(loss, x, tuple(y[0] for y in t))[1], indices)(*(y[0] for y in x)),
        "dual level": dual_level,
        "jacfwd(jacfwd)": lambda x, t: jacfwd(jacfwd(loss))(*(y[0] for y in x)),
        "hessian": lambda x, t: hessian(loss)(*(y[0] for y in x)),
    }


# Third derivatives of these are torch's own, in which it errs.
TORCHS_THIRD = ("rms norm", "rms norm of two dimensions", "rms norm alone")


@pytest.mark.parametrize("transform", transforms(gelu, ((1,),)))
@pytest.mark.parametrize("name", COMPOSED)
def test_transforms(name, transform, generator):
    ours, _, shapes = OPS[name]
    if transform == "third" and name in TORCHS_THIRD:
        pytest.skip("torch's own third derivative")
    x, t = drawn(shapes, generator, tasks=(2,)), drawn(shapes, generator, tasks=(2,))
    expected = pytree.tree_leaves(transforms(COMPOSED[name], shapes)[transform](x, t))
    # The third derivative of the reference path is torch's own.
    for backend in ("auto",) if transform == "third" else ("auto", "reference"):
        with metafast.use_backend(backend):
            found = pytree.tree_leaves(transforms(ours, shapes)[transform](x, t))
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape, backend
            assert relative_error(a, b) < 1e-10, backend


def test_gelu_far_out(generator):
    x = torch.tensor([-1e30, -40.0, -10.0, -4.1, -0.0, 0.0, 4.1, 10.0, 40.0, 1e30])
    (tangent,) = drawn(((10,),), generator, torch.float32)
    _, grads, by_x, by_grad = second_order(gelu, [x], [tangent])
    exact = second_order(F.gelu, [x.double()], [tangent])
    for a, b in zip((grads, by_x, by_grad), exact[1:], strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() < 1e-6


def test_layer_norm_of_one_number(generator):
    """It is its bias, whatever the number: all else is 0, or rounding times 1 / sqrt(eps)."""
    inputs, cotangents = drawn(((4, 1), (1,), (1,)), generator), drawn(((4, 1), (1,), (1,)), generator)
    out, *grads = second_order(norm, inputs, cotangents)
    assert torch.equal(out, inputs[2].expand(4, 1))
    assert relative_error(grads[2], cotangents[0].sum(0)) < 1e-12
    for rest in (grads[0], grads[1], *grads[3:-1]):
        assert rest.abs().max() < 1e-10


def test_opcheck(generator):
    ops, checks = torch.ops.metafast, ("test_schema", "test_faketensor")
    x = drawn(((2, 5, 6),) * 3, generator, torch.float32)
    weights = drawn(((2, 6),) * 3, generator, torch.float32)
    torch.library.opcheck(ops.gelu_double_backward.default, x, test_utils=checks)
    torch.library.opcheck(ops.layer_norm_forward.default, (x[0], *weights[:2], 1e-5), test_utils=checks)
    _, statistics = ops.layer_norm_forward(x[0], *weights[:2], 1e-5)
    saved = (x[1], x[0], weights[0], statistics)
    torch.library.opcheck(ops.layer_norm_backward.default, saved, test_utils=checks)
    torch.library.opcheck(ops.layer_norm_backward_jvp.default, (*saved, x[2], *weights[1:]), test_utils=checks)


def test_sums_do_not_depend_on_threads(generator):
    inputs, cotangents = (
        drawn(((700, 9), (9,), (9,)), generator, torch.float32),
        drawn(((700, 9), (9,), (9,)), generator),
    )
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(second_order(norm, inputs, cotangents))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: layer_norm(x.bfloat16(), (6,), x[0, 0].bfloat16(), x[0, 1].bfloat16()),
        lambda x: layer_norm(x.bfloat16(), (6,), x[0, 0], x[0, 1]),
        lambda x: layer_norm(x.bfloat16(), (5, 6), None, x[0].bfloat16()),
        lambda x: rms_norm(x.bfloat16(), (6,), x[0, 0].bfloat16()),
        lambda x: gelu(x, approximate="tanh"),
        lambda x: gelu(x.half()),
    ],
    ids=["bfloat16", "bfloat16 and float32", "bfloat16 without weight", "rms norm", "tanh", "half"],
)
def test_what_the_kernels_do_not_take_is_torchs(call, generator):
    x = torch.randn(4, 5, 6, generator=generator)
    with metafast.use_backend("reference"):
        expected = call(x)
    assert torch.equal(call(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in COMPOSED if name != "gelu"])
def test_half_types_in_forward_mode(name, dtype, generator):
    """As good as torch's own values, and derivatives to the precision of the type."""
    ours, torchs, shapes = OPS[name]
    x, t = drawn(shapes, generator, dtype), drawn(shapes, generator, dtype)
    out, tangent = jvp(ours, x, t)
    exact, exact_tangent = jvp(COMPOSED[name], *(tuple(y.double() for y in z) for z in (x, t)))
    assert out.dtype == tangent.dtype == dtype
    assert relative_error(out, exact) <= 2 * relative_error(torchs(*x), exact)
    assert relative_error(tangent, exact_tangent) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "call",
    [
        lambda x: layer_norm(x, (5,)),
        lambda x: layer_norm(x, (6,), x[0]),
        lambda x: layer_norm(x, ()),
        lambda x: rms_norm(x, (5,)),
        lambda x: rms_norm(x, (6,), x[0]),
    ],
)
def test_shapes_that_do_not_fit_are_torchs_errors(call, generator):
    x = torch.randn(4, 5, 6, generator=generator)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        call(x)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        jvp(call, (x,), (x,))


def test_accelerate_swaps_them_in(generator):
    model = torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.GELU(), torch.nn.Linear(6, 2)).double()
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    with metafast.accelerate(model):
        out = model(x)
    names = set()
    stack = [out.grad_fn]
    while stack:
        node = stack.pop()
        names.add(node.name())
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    assert {"_LayerNormBackward", "_GeluBackward"} <= names
    assert relative_error(out, model(x)) < 1e-14
