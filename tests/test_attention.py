"""Fused attention on the CPU against float64, against torch's own op and in every mode of differentiation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import metafast
from metafast.ops.attention import scaled_dot_product_attention
from metafast.testing import ATTENTION_CASES, AttentionCase, relative_error, second_order

pytestmark = pytest.mark.usefixtures("fused_cpu")
CASES = pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)


def attention(backend):
    return lambda *args, **kwargs: scaled_dot_product_attention(*args, **kwargs, backend=backend)


def math_attention(query, key, value, attn_mask=None, is_causal=False, window_size=None, **options):
    """Torch's own dense path, which is differentiable twice; it takes a mask or is_causal, not both, and no window."""
    left, right = window_size or (None, None)
    distance = torch.arange(key.shape[-2]) - torch.arange(query.shape[-2])[:, None]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left not in (None, -1):
        allowed &= distance >= -left
    if right not in (None, -1):
        allowed &= distance <= right
    if is_causal:
        allowed &= distance <= 0
    if attn_mask is None:
        attn_mask = allowed
    elif attn_mask.dtype == torch.bool:
        attn_mask = attn_mask & allowed
    else:
        attn_mask = attn_mask.masked_fill(~allowed, -torch.inf)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


@pytest.mark.parametrize("case", [case for case in ATTENTION_CASES if case.dropout_p == 0], ids=lambda case: case.name)
def test_reference_is_torchs_attention(case: AttentionCase, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float64, generator)
    expected = second_order(math_attention, inputs)
    for name, value in second_order(attention("reference"), inputs).items():
        assert value.isfinite().all()
        if expected[name].isfinite().all():
            assert relative_error(value, expected[name]) < 1e-12, name
            continue
        # Torch gives NaN derivatives around a row that may attend to nothing; ours are the limit, 0.
        assert case.mask == "full" or case.window_size is not None
        assert not name.startswith(("out", "grad_value"))


@CASES
def test_float64_to_second_order(case: AttentionCase, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float64, generator)
    expected = second_order(attention("reference"), inputs)
    for name, value in second_order(attention("fused"), inputs).items():
        assert value.shape == expected[name].shape
        assert relative_error(value, expected[name]) < 1e-12, name


@CASES
def test_float32_is_as_good_as_eager(case: AttentionCase, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float32, generator)
    exact = second_order(attention("reference"), inputs.to(torch.float64))
    eager = second_order(attention("reference"), inputs)
    for name, value in second_order(attention("fused"), inputs).items():
        error, bar = relative_error(value, exact[name]), 2 * relative_error(eager[name], exact[name])
        # Where eager is exact to the last bit, by luck or because nothing is summed, rounding is still allowed.
        assert error <= bar + 2 * torch.finfo(torch.float32).eps, name


def test_gradcheck(generator: torch.Generator) -> None:
    inputs = AttentionCase("", 4, 5, 3, value_dim=2, lead=(1,), heads=2, mask="full").inputs(torch.float64, generator)
    qkv = [x.requires_grad_() for x in inputs.qkv]

    def function(*qkv):
        return scaled_dot_product_attention(*qkv, **inputs.options, backend="fused")

    assert torch.autograd.gradcheck(function, qkv, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, qkv, check_fwd_over_rev=True, check_rev_over_rev=True)


def loss(backend, **options):
    return lambda *qkv: scaled_dot_product_attention(*qkv, **options, backend=backend).pow(3).sum()


def gradient_norm(backend):
    return lambda *qkv: sum(g.pow(2).sum() for g in grad(loss(backend), (0, 1, 2))(*qkv))


# Each takes a backend, tensors of one more dimension than attention needs, and directions for one entry.
TRANSFORMS = {
    "grad": lambda b, x, t: grad(loss(b), (0, 1, 2))(*x),
    "vmap": lambda b, x, t: vmap(lambda *qkv: scaled_dot_product_attention(*qkv, backend=b))(*x),
    "vmap(grad)": lambda b, x, t: vmap(grad(loss(b), (0, 1, 2)))(*x),
    "vmap(grad), shared key": lambda b, x, t: vmap(grad(loss(b), (0, 1, 2)), (0, None, 2))(
        x[0], x[1][0], x[2].movedim(0, 2)
    ),
    "vmap(vmap(grad))": lambda b, x, t: vmap(vmap(grad(loss(b), (0, 1, 2))))(*x),
    "grad(grad)": lambda b, x, t: grad(gradient_norm(b), (0, 1, 2))(*x),
    "vmap(grad(grad))": lambda b, x, t: vmap(grad(gradient_norm(b), (0, 1, 2)))(*x),
    "jvp": lambda b, x, t: jvp(loss(b), x, t),
    "vjp": lambda b, x, t: vjp(loss(b), *x)[1](torch.ones((), dtype=torch.float64)),
    "jvp(grad)": lambda b, x, t: jvp(grad(loss(b), (0, 1, 2)), x, t),
    "grad(jvp)": lambda b, x, t: grad(lambda *qkv: jvp(loss(b), qkv, t)[1], (0, 1, 2))(*x),
    "vmap(jvp)": lambda b, x, t: vmap(lambda x, t: jvp(loss(b), x, t))(x, t),
    "jacrev": lambda b, x, t: jacrev(loss(b), (0, 1, 2))(*x),
    "jacfwd": lambda b, x, t: jacfwd(loss(b), (0, 1, 2))(*x),
    "hessian": lambda b, x, t: hessian(loss(b), (0, 2))(*(y[0, :, :1] for y in x)),
    "jacrev(jacrev)": lambda b, x, t: jacrev(jacrev(loss(b), 1), 0)(*(y[0] for y in x)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, generator: torch.Generator) -> None:
    x = tuple(torch.randn(2, 2, n, 3, generator=generator, dtype=torch.float64) for n in (3, 4, 4))
    t = tuple(torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in x)
    found, expected = (pytree.tree_leaves(TRANSFORMS[name](backend, x, t)) for backend in ("fused", "reference"))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-11


def test_vmap_over_masks(generator: torch.Generator) -> None:
    x = tuple(torch.randn(3, 2, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(3, 2, 1, 5, 5, generator=generator) < 0.6
    for in_dims, masks in (
        ((0, 0, 0, 0), mask),
        ((0, 0, 0, None), mask[0, 0, 0]),
        ((0, 0, 0, 1), mask.transpose(0, 1)),
    ):
        found, expected = (
            vmap(lambda q, k, v, m, b=b: grad(loss(b, attn_mask=m), (0, 1, 2))(q, k, v), in_dims)(*x, masks)
            for b in ("fused", "reference")
        )
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 1e-12


def test_third_order_raises(generator: torch.Generator) -> None:
    qkv = [torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    first = torch.autograd.grad(loss("fused")(*qkv), qkv, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice"):
        torch.autograd.grad(second[0].pow(2).sum(), qkv)


def test_forward_over_forward_raises(generator: torch.Generator) -> None:
    qkv = tuple(torch.randn(1, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jacfwd(jacfwd(loss("fused")))(*qkv)


def test_opcheck(generator: torch.Generator) -> None:
    import metafast.ops.attention.library  # noqa: F401

    ops = torch.ops.metafast
    q, k, v = (torch.randn(2, 2, n, 4, generator=generator) for n in (5, 6, 6))
    out, lse = ops.attention_forward(q, k, v, None, False, 0.5)
    saved, tangents, options = (q, k, v, out, lse), (q.flip(0), k.flip(0), v.flip(0)), (None, False, 0.5)
    torch.library.opcheck(ops.attention_forward.default, (q.requires_grad_(), k, v, *options))
    checks = ("test_schema", "test_faketensor")  # these are differentiated through autograd.Function, not as ops
    q = q.detach()
    torch.library.opcheck(ops.attention_backward.default, (out, *saved, *options), test_utils=checks)
    torch.library.opcheck(ops.attention_jvp.default, (*saved, *tangents, *options), test_utils=checks)
    torch.library.opcheck(
        ops.attention_backward_jvp.default, (out, *saved, *tangents, None, *options), test_utils=checks
    )


def test_compiles_without_graph_breaks(generator: torch.Generator) -> None:
    qkv = [torch.randn(2, 2, 6, 4, generator=generator, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(loss("auto", is_causal=True), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*qkv), qkv)
    for a, b in zip(found, torch.autograd.grad(loss("reference", is_causal=True)(*qkv), qkv), strict=True):
        assert relative_error(a, b) < 1e-5


def test_bitwise_deterministic(generator: torch.Generator) -> None:
    inputs = AttentionCase("", 130, 200, 16, lead=(1,), heads=1).inputs(torch.float32, generator)
    first, again = (second_order(attention("fused"), inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


def test_outputs_keep_the_memory_order_of_inputs(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 5, 3, 8, generator=generator).transpose(1, 2) for _ in range(3))
    assert scaled_dot_product_attention(q, k, v, backend="fused").stride() == q.stride()


def test_strides_that_kernels_do_not_take_as_they_are(generator: torch.Generator) -> None:
    base = torch.randn(2, 3, 8, 6, generator=generator, dtype=torch.float64)
    q, k = base.mT, base.mT[:, :1, :1].expand(2, 3, 6, 8)
    v = torch.randn(2, 3, 6, 10, generator=generator, dtype=torch.float64)[..., ::2]
    mask = (torch.rand(6, 6, generator=generator) < 0.7).mT
    for options in ({}, {"attn_mask": mask}):
        found, expected = (scaled_dot_product_attention(q, k, v, **options, backend=b) for b in ("fused", "reference"))
        assert relative_error(found, expected) < 1e-12
    x = torch.randn(2, 3, 6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(scaled_dot_product_attention(x, x, x, backend=b).sum(), x)[0]
        for b in ("fused", "reference")
    ]
    assert relative_error(*grads) < 1e-10


@pytest.mark.parametrize(("batch", "rows", "columns"), [(0, 4, 5), (2, 0, 5), (2, 4, 0), (0, 0, 0)])
def test_empty_dimensions(batch: int, rows: int, columns: int) -> None:
    q, k = (torch.randn(batch, 2, length, 8, requires_grad=True) for length in (rows, columns))
    out = scaled_dot_product_attention(q, k, k, backend="fused")
    out.sum().backward()
    assert torch.equal(out, torch.zeros(batch, 2, rows, 8))
    assert torch.equal(q.grad, torch.zeros_like(q))
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_nan_is_passed_on() -> None:
    q = torch.randn(1, 1, 3, 4)
    q[0, 0, 1, 2] = torch.nan
    out = scaled_dot_product_attention(q, torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), backend="fused")
    assert out[0, 0, 1].isnan().all()
    assert out[0, 0, [0, 2]].isfinite().all()


def test_autocast_as_torch(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8, generator=generator) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            scaled_dot_product_attention(q, k, v).dtype
            == F.scaled_dot_product_attention(q, k, v).dtype
            == torch.bfloat16
        )


def test_dropout_runs_on_the_reference_path(generator: torch.Generator) -> None:
    q, k, v = (torch.ones(1, 1, 64, 4) for _ in range(3))
    out = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert out.std() > 0
    assert abs(out.mean() - 1) < 0.2
    with pytest.raises(metafast.BackendUnavailableError, match="dropout"):
        scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend="fused")


def tensors(*shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1, *tensors((2, 4), (2, 4))), {}, TypeError, "query: expected a tensor, got int"),
        (tensors((4,), (4,), (4,)), {}, ValueError, r"query: expected at least 2 dimensions .* got shape \(4,\)"),
        (tensors((2, 4), (2, 4), (2, 4), dtype=torch.int64), {}, TypeError, "query: expected a floating dtype"),
        (tensors((1, 2, 4), (2, 4), (1, 2, 4)), {}, ValueError, "key: expected query's 3 dimensions"),
        (
            (*tensors((2, 4), (2, 4)), torch.zeros(2, 4, dtype=torch.float64)),
            {},
            TypeError,
            "value: expected query's dtype",
        ),
        (
            (*tensors((2, 4), (2, 4)), torch.zeros(2, 4, device="meta")),
            {},
            ValueError,
            "value: expected query's device",
        ),
        (tensors((2, 4), (2, 5), (2, 4)), {}, ValueError, "key: expected query's head dimension 4"),
        (tensors((2, 0), (2, 0), (2, 4)), {}, ValueError, "query: expected a head dimension of at least 1"),
        (tensors((2, 4), (3, 4), (2, 4)), {}, ValueError, "value: expected key's length 3"),
        (tensors((4, 2, 4), (2, 2, 4), (2, 2, 4)), {}, ValueError, "key: expected query's 4 heads"),
        (tensors((4, 2, 4), (3, 2, 4), (3, 2, 4)), {"enable_gqa": True}, ValueError, "divides query's 4"),
        (tensors((4, 2, 4), (2, 2, 4), (4, 2, 4)), {"enable_gqa": True}, ValueError, "value: expected key's 2 heads"),
        (tensors((2, 1, 2, 4), (3, 1, 2, 4), (2, 1, 2, 4)), {}, ValueError, "key: expected leading dimensions"),
        (
            tensors((2, 4), (3, 4), (3, 4)),
            {"attn_mask": torch.ones(3, 2, dtype=torch.bool)},
            ValueError,
            "attn_mask: expected a shape",
        ),
        (
            tensors((2, 4), (3, 4), (3, 4)),
            {"attn_mask": torch.ones(2, 3, dtype=torch.int64)},
            TypeError,
            "attn_mask: expected dtype",
        ),
        (tensors((2, 4), (3, 4), (3, 4)), {"attn_mask": [1]}, TypeError, "attn_mask: expected a tensor"),
        (tensors((2, 4), (3, 4), (3, 4)), {"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability"),
        (tensors((2, 4), (3, 4), (3, 4)), {"backend": "quick"}, ValueError, "backend: expected one of 'auto', 'fused'"),
    ],
)
def test_bad_arguments(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*arguments, **options)


def test_fused_on_request_only_or_with_every_reason() -> None:
    q = torch.zeros(1, 2, 4, dtype=torch.float16)
    mask = torch.zeros(2, 2, dtype=torch.float16, requires_grad=True)
    with pytest.raises(metafast.BackendUnavailableError, match=r"no cpu kernel for torch.float16; dropout; attn_mask"):
        scaled_dot_product_attention(q, q, q, mask, dropout_p=0.1, backend="fused")
    assert scaled_dot_product_attention(q, q, q, mask).requires_grad
