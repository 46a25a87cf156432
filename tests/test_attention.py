"""Fused attention on the CPU against float64, against torch's own op and in every mode of differentiation."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import metafast
from metafast.ops.attention import reference, scaled_dot_product_attention
from metafast.ops.attention.options import NO_LIMIT
from metafast.testing import ATTENTION_CASES, AttentionCase, relative_error, second_order

pytestmark = pytest.mark.usefixtures("fused_cpu")
CASES = pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)


def attention(backend):
    return lambda *args, **kwargs: scaled_dot_product_attention(*args, **kwargs, backend=backend)


def math_attention(
    query,
    key,
    value,
    attn_mask=None,
    is_causal=False,
    window_size=None,
    query_offset=0,
    key_start=None,
    key_length=None,
    **options,
):
    """Torch's own dense path, which is differentiable twice; it takes a mask or is_causal, not both, and no window."""
    left, right = window_size or (None, None)
    distance = torch.arange(key.shape[-2]) - (torch.arange(query.shape[-2]) + query_offset)[:, None]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left not in (None, -1):
        allowed &= distance >= -left
    if right not in (None, -1):
        allowed &= distance <= right
    if is_causal:
        allowed &= distance <= 0
    column = torch.arange(key.shape[-2])
    start = torch.tensor(0) if key_start is None else key_start[..., None, None, None]
    if key_start is not None:
        allowed = allowed & (column >= start)
    if key_length is not None:
        allowed = allowed & (column < start + key_length[..., None, None, None])
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
        assert (
            case.mask == "full"
            or case.window_size is not None
            or case.query_offset < 0
            or case.has_start
            or case.has_length
        )
        assert not name.startswith(("out", "grad_value"))


@CASES
def test_float64_to_second_order(case: AttentionCase, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float64, generator)
    expected = second_order(attention("reference"), inputs)
    for name, value in second_order(attention("fused"), inputs).items():
        assert value.shape == expected[name].shape
        assert relative_error(value, expected[name]) < 1e-12, name


def errors_and_bars(
    case: AttentionCase, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, tuple[float, float]]:
    """Of every output the error of the fused path and twice that of eager attention, both against float64.

    Over several draws together: where a result is a few numbers, eager attention is now and then exact by luck.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for _ in range(4):
        inputs = case.inputs(dtype, generator)
        exact = second_order(attention("reference"), inputs.to(torch.float64))
        eager = second_order(attention("reference"), inputs)
        for name, value in second_order(attention("fused"), inputs).items():
            assert value.dtype == dtype
            pair = relative_error(value, exact[name]), 2 * relative_error(eager[name], exact[name])
            errors.setdefault(name, []).append(pair)
    return {name: tuple(math.hypot(*side) / 2 for side in zip(*pairs, strict=True)) for name, pairs in errors.items()}


@CASES
def test_float32_is_as_good_as_eager(case: AttentionCase, generator: torch.Generator) -> None:
    for name, (error, bar) in errors_and_bars(case, torch.float32, generator).items():
        # Where eager is exact because nothing is summed, rounding is still allowed.
        assert error <= bar + 2 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@CASES
def test_half_is_as_good_as_eager(case: AttentionCase, dtype: torch.dtype, generator: torch.Generator) -> None:
    if case.mask == "lowest" and dtype == torch.float16:
        pytest.skip("the lowest float32 is -inf in float16")
    for name, (error, bar) in errors_and_bars(case, dtype, generator).items():
        assert error <= bar + 2 * torch.finfo(dtype).eps, name


@CASES
def test_bfloat16_of_wide_heads(case: AttentionCase, generator: torch.Generator) -> None:
    """Heads that tile instructions are used for, where there are some: none as wide as a tile, or two."""
    wide = replace(case, head_dim=case.head_dim + 17, value_dim=(case.value_dim or case.head_dim) + 30)
    for name, (error, bar) in errors_and_bars(wide, torch.bfloat16, generator).items():
        assert error <= bar + 2 * torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize(
    ("rows", "columns", "head_dim", "value_dim"),
    [
        (1, 1, 16, 16),
        (33, 31, 64, 64),
        (17, 600, 128, 96),
        (290, 33, 100, 16),
        (130, 1030, 65, 130),
        (40, 50, 512, 400),
        (40, 50, 512, 513),
    ],
)
def test_bfloat16_of_awkward_sizes(
    rows: int, columns: int, head_dim: int, value_dim: int, generator: torch.Generator
) -> None:
    case = AttentionCase("", rows, columns, head_dim, value_dim=value_dim, lead=(1,), key_offset=3.0)
    for name, (error, bar) in errors_and_bars(case, torch.bfloat16, generator).items():
        assert error <= bar + 2 * torch.finfo(torch.bfloat16).eps, name


def test_bfloat16_passes_on_what_is_not_finite(generator: torch.Generator) -> None:
    query, key, value = (torch.randn(1, 1, 40, 32, generator=generator, dtype=torch.bfloat16) for _ in range(3))
    query[0, 0, 3, 5] = math.nan
    value[0, 0, 7, 2] = math.inf
    found = attention("fused")(query, key, value)
    # In float64: in bfloat16 torch 2.11's products carry a NaN to the row before.
    expected = attention("reference")(*(x.double() for x in (query, key, value)))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())


def test_gradcheck(generator: torch.Generator) -> None:
    inputs = AttentionCase("", 4, 5, 3, value_dim=2, lead=(1,), heads=2, mask="full").inputs(torch.float64, generator)
    qkv = [x.requires_grad_() for x in inputs.qkv]

    def function(*qkv):
        return scaled_dot_product_attention(*qkv, **inputs.options, backend="fused")

    assert torch.autograd.gradcheck(function, qkv, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, qkv, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("mask_shape", [(2, 2, 3, 4), (3, 4), (2, 1, 4), (2, 1, 1, 4), (1,)])
def test_gradcheck_of_a_mask(mask_shape: tuple[int, ...], generator: torch.Generator) -> None:
    shapes = ((2, 2, 3, 2), (2, 2, 4, 2), (2, 2, 4, 2), mask_shape)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]

    def function(*inputs):
        torch.manual_seed(0)
        return scaled_dot_product_attention(*inputs, dropout_p=0.3, window_size=(2, 1), backend="fused")

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


def loss(backend, **options):
    return lambda *qkv: scaled_dot_product_attention(*qkv, **options, backend=backend).pow(3).sum()


def gradient_norm(backend, **options):
    return lambda *qkv: sum(g.pow(2).sum() for g in grad(loss(backend, **options), (0, 1, 2))(*qkv))


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


# Each takes a backend, tensors of one more dimension than attention needs, biases for every pair, and directions.
MASK_TRANSFORMS = {
    "vmap(grad)": lambda b, x, t: vmap(grad(mask_loss(b), (0, 1, 2, 3)))(*x),
    "vmap(grad), shared bias": lambda b, x, t: vmap(grad(mask_loss(b), (0, 3)), (0, 0, 0, None))(*x[:3], x[3][0]),
    "grad(vmap), shared bias": lambda b, x, t: grad(
        lambda q, bias: vmap(mask_loss(b), (0, 0, 0, None))(q, *x[1:3], bias).sum(), (0, 1)
    )(x[0], x[3][0, :1]),
    "grad(grad)": lambda b, x, t: grad(mask_gradient_norm(b), (0, 1, 2, 3))(*x),
    "vmap(grad(grad)), shared bias": lambda b, x, t: vmap(grad(mask_gradient_norm(b), (0, 3)), (0, 0, 0, None))(
        *x[:3], x[3][0]
    ),
    "jvp": lambda b, x, t: jvp(mask_loss(b), x, t),
    "jvp(grad)": lambda b, x, t: jvp(grad(mask_loss(b), (0, 1, 2, 3)), x, t),
    "grad(jvp)": lambda b, x, t: grad(lambda *x: jvp(mask_loss(b), x, t)[1], (0, 1, 2, 3))(*x),
    "vmap(grad(jvp)), shared bias": lambda b, x, t: vmap(
        lambda q, k, v, tq: grad(
            lambda q, bias: jvp(lambda q, bias: mask_loss(b)(q, k, v, bias), (q, bias), (tq, bias.cos()))[1], (0, 1)
        )(q, x[3][0])
    )(*x[:3], t[0]),
    "jacfwd by the bias": lambda b, x, t: jacfwd(mask_loss(b), 3)(*(y[0] for y in x)),
    "hessian by the bias": lambda b, x, t: hessian(mask_loss(b), (1, 3))(*(y[0, :1, :2] for y in x)),
}


def mask_loss(backend):
    # A mask that is not square once the hessian has cut it: columns follow the keys.
    return lambda q, k, v, bias: loss(backend, attn_mask=bias[..., : k.shape[-2]], window_size=(2, None))(q, k, v)


def mask_gradient_norm(backend):
    return lambda *x: sum(g.pow(2).sum() for g in grad(mask_loss(backend), (0, 1, 2, 3))(*x))


@pytest.mark.parametrize("name", MASK_TRANSFORMS)
def test_transforms_of_a_mask(name: str, generator: torch.Generator) -> None:
    shapes = ((2, 2, 3, 3), (2, 2, 4, 3), (2, 2, 4, 3), (2, 2, 3, 4))
    x = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    t = tuple(torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in x)
    found, expected = (pytree.tree_leaves(MASK_TRANSFORMS[name](backend, x, t)) for backend in ("fused", "reference"))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-11


def test_third_order_raises(generator: torch.Generator) -> None:
    qkv = [torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    first = torch.autograd.grad(loss("fused")(*qkv), qkv, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice"):
        torch.autograd.grad(second[0].pow(2).sum(), qkv)


def test_forward_over_forward_runs_on_the_reference_path(generator: torch.Generator) -> None:
    qkv = tuple(torch.randn(1, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    found, expected = (jacfwd(jacfwd(loss(b)))(*qkv) for b in ("auto", "reference"))
    assert torch.equal(found, expected)
    with pytest.raises(metafast.BackendUnavailableError, match="forward mode over forward mode"):
        jacfwd(jacfwd(loss("fused")))(*qkv)


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("lengths", [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_biases_of_torch(make, lengths: tuple[int, int], generator: torch.Generator) -> None:
    rows, columns = lengths
    inputs = AttentionCase("", rows, columns, 8, heads=4, key_heads=2).inputs(torch.float64, generator)
    bias = make(rows, columns)
    dense = replace(inputs, options={**inputs.options, "attn_mask": bias._materialize()})
    expected = second_order(attention("reference"), dense)
    inputs.options["attn_mask"] = bias
    for backend in ("fused", "reference"):
        for name, value in second_order(attention(backend), inputs).items():
            assert relative_error(value, expected[name]) < 1e-12, name


def test_a_causal_bias_beside_other_options(generator: torch.Generator) -> None:
    """It limits keys as the mask that it stands for, wherever rows stand."""
    q, k, v = (torch.randn(2, n, 4, generator=generator, dtype=torch.float64) for n in (5, 8, 8))
    bias = causal_lower_right(5, 8)
    options = {"is_causal": True, "window_size": (4, 1), "query_offset": 4}
    for given in ({}, options, {**options, "query_offset": 1}):
        dense = scaled_dot_product_attention(q, k, v, bias._materialize(), **given, backend="reference")
        assert relative_error(scaled_dot_product_attention(q, k, v, bias, **given, backend="fused"), dense) < 1e-12


def test_a_causal_bias_compiles(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, n, 4, generator=generator, requires_grad=True) for n in (5, 8, 8))
    bias = causal_lower_right(5, 8)

    def function(q, k, v):
        return scaled_dot_product_attention(q, k, v, bias).pow(2).sum()

    found = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v), (q, k, v))
    for a, b in zip(found, torch.autograd.grad(function(q, k, v), (q, k, v)), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    ("start", "length", "existing"),
    [
        (2, None, range(2, 6)),
        (None, 4, range(4)),
        (2, 3, range(2, 5)),
        (-2, 5, range(3)),
        (-9, 5, ()),
        (4, 100, range(4, 6)),
        (100, 3, ()),
        (1, -1, ()),
        (-(2**63), 2**63 - 1, ()),
        (2**62, 2**63 - 1, ()),
        (0, 2**63 - 1, range(6)),
    ],
)
def test_which_keys_exist(start, length, existing) -> None:
    """Ranges are cut to the keys; the weights are read off values that are the identity."""
    q, k, v = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 6, 3), torch.eye(6)[None, None]
    start, length = (None if number is None else torch.tensor([number]) for number in (start, length))
    for backend in ("fused", "reference"):
        out = scaled_dot_product_attention(q, k, v, key_start=start, key_length=length, backend=backend)
        assert [column for column in range(6) if out[0, 0, 1, column] > 0] == list(existing)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_key_lengths_broadcast(dtype: torch.dtype, generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 3, 2, n, 4, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    for shape in ((2, 3), (3,), (2, 1), (1, 1), ()):
        length = torch.randint(1, 8, shape, generator=generator, dtype=dtype)
        mask = torch.arange(7) < length[..., None, None, None]
        expected = scaled_dot_product_attention(q, k, v, mask, backend="reference")
        found = scaled_dot_product_attention(q, k, v, key_length=length, backend="fused")
        assert relative_error(found, expected) < 1e-12


def test_vmap_over_key_ranges(generator: torch.Generator) -> None:
    x = tuple(torch.randn(3, 2, 2, n, 4, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    start, length = torch.tensor([[0, 2], [3, 0], [1, 1]]), torch.tensor([4, 5])
    for in_dims, starts in (
        ((0, 0, 0, 0), start),
        ((0, 0, 0, 1), start.T),
        ((0, 0, 0, None), start[0]),
        ((None,) * 3 + (0,), start),
    ):
        inputs = x if in_dims[0] == 0 else tuple(y[0] for y in x)

        def gradients(q, k, v, start, backend):
            return grad(gradient_norm(backend, key_start=start, key_length=length), (0, 1, 2))(q, k, v)

        found, expected = (
            vmap(lambda *args, b=b: gradients(*args, b), in_dims)(*inputs, starts) for b in ("fused", "reference")
        )
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("mask", [None, "bias of heads"])
def test_opcheck(mask: str | None, generator: torch.Generator) -> None:
    import metafast.ops.attention.library  # noqa: F401

    ops = torch.ops.metafast
    case = AttentionCase("", 5, 6, 4, mask=mask)
    inputs = case.inputs(torch.float32, generator)
    bias = inputs.options["attn_mask"]
    bias = None if bias is None else bias.nan_to_num(neginf=-3.0)[None]
    seeds = torch.tensor([3, -4]) if mask else None
    ranges = torch.tensor([[1, 5], [0, 6]]) if mask else None
    options = (bias, seeds, ranges, 2, NO_LIMIT, 0.25 if mask else 0.0, 0.5)
    out, statistics = ops.attention_forward(*inputs.qkv, *options)
    first = (inputs.grad_out, *inputs.qkv, out, statistics)
    tangents = (*inputs.tangents, inputs.tangent_mask[None] if mask else None)
    differentiable = tuple(x.clone().requires_grad_() for x in inputs.qkv)
    torch.library.opcheck(ops.attention_forward.default, (*differentiable, *options))
    # These are differentiated through autograd.Function, not as ops.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.attention_backward.default, (*first, *options), test_utils=checks)
    torch.library.opcheck(ops.attention_jvp.default, (*first[1:], *tangents, *options), test_utils=checks)
    second = (*first, *tangents, None, *options)
    torch.library.opcheck(ops.attention_backward_jvp.default, second, test_utils=checks)
    if mask:
        torch.library.opcheck(ops.attention_mask_backward.default, (*first, *options), test_utils=checks)
        torch.library.opcheck(ops.attention_mask_backward_jvp.default, second, test_utils=checks)


def test_compiles_without_graph_breaks(generator: torch.Generator) -> None:
    qkv = [torch.randn(2, 2, 6, 4, generator=generator, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 6, 6, generator=generator, requires_grad=True)
    options = {"is_causal": True, "window_size": (3, None), "query_offset": 1, "key_length": torch.tensor([4, 6])}

    def of(backend):
        return lambda *qkv: loss(backend, attn_mask=bias, **options)(*qkv)

    compiled = torch.compile(of("auto"), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*qkv), (*qkv, bias))
    for a, b in zip(found, torch.autograd.grad(of("reference")(*qkv), (*qkv, bias)), strict=True):
        assert relative_error(a, b) < 1e-5


def test_second_order_through_compile_raises(generator: torch.Generator) -> None:
    """Torch itself has no double backward through what it compiled, and says so."""
    qkv = [torch.randn(2, 2, 6, 4, generator=generator, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(loss("auto"), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        first = torch.autograd.grad(compiled(*qkv), qkv, create_graph=True)
        torch.autograd.grad(sum(g.pow(2).sum() for g in first), qkv)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_activation_checkpointing(use_reentrant: bool, generator: torch.Generator) -> None:
    qkv = [torch.randn(2, 2, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def function(*qkv):
        return scaled_dot_product_attention(*qkv, dropout_p=0.4, backend="fused").pow(2).sum()

    grads = []
    for call in (function, lambda *qkv: checkpoint(function, *qkv, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(*qkv), qkv) if not use_reentrant else _backward(call(*qkv), qkv))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def _backward(value, inputs):
    for x in inputs:
        x.grad = None
    value.backward()
    return [x.grad for x in inputs]


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


def keeps(seed, shape, p):
    """Which weights are kept, read off the output: with values that are the identity the output is the weights."""
    batch, heads, rows, columns = shape
    q, k = torch.zeros(batch, heads, rows, 1), torch.zeros(batch, heads, columns, 1)
    torch.manual_seed(seed)
    out = scaled_dot_product_attention(
        q, k, torch.eye(columns).expand(batch, heads, -1, -1), dropout_p=p, backend="fused"
    )
    assert torch.allclose(out[out != 0], torch.tensor(1 / columns / (1 - p)))
    return out != 0


def test_dropout_keeps_the_share_that_it_says() -> None:
    p = 0.3
    kept = keeps(0, (4, 4, 128, 130), p).double()
    # Five standard deviations of a mean of independent draws: over all, over each row, column and head, and of pairs.
    for dims in ((0, 1, 2, 3), (0, 1, 3), (0, 1, 2), (0, 2, 3), (1, 2, 3)):
        means = kept.mean(dims)
        count = kept.numel() / means.numel()
        assert ((means - (1 - p)).abs() < 5 * math.sqrt(p * (1 - p) / count)).all()
    centred = kept - (1 - p)
    for neighbour in (
        centred.roll(1, 3),
        centred.roll(4, 3),
        centred.roll(1, 2),
        centred.roll(1, 1),
        centred.roll(1, 0),
    ):
        assert (centred * neighbour).mean().abs() < 5 * p * (1 - p) / math.sqrt(kept.numel())


def test_dropout_replays() -> None:
    first, again, other = (keeps(seed, (2, 3, 20, 21), 0.5) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_dropout_is_philox() -> None:
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""
    for counter, key, words in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        found = reference._philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(word.item() for word in found) == words


def test_dropout_under_vmap() -> None:
    x = torch.ones(3, 2, 16, 16, 4)

    def weights(x):
        return scaled_dot_product_attention(0 * x, 0 * x, x, dropout_p=0.5, backend="fused")

    different = vmap(weights, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    same = vmap(weights, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(weights)(x)


def test_a_bias_that_all_columns_share_has_no_effect(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(3, 5, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    out = scaled_dot_product_attention(q, k, v, bias, backend="fused")
    assert relative_error(out, scaled_dot_product_attention(q, k, v, backend="fused")) < 1e-12
    (gradient,) = torch.autograd.grad(out.pow(2).sum(), bias)
    assert gradient.shape == bias.shape
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512", "amx"])
def test_each_instruction_set(capability: str) -> None:
    """The case table in a process that is held to narrower vectors."""
    order = ["baseline", "avx2", "avx512", "amx"]
    available = metafast.build_info()["extension"]["cpu_capability"]
    if order.index(capability) > order.index(available):
        pytest.skip(f"this machine has {available} at most")
    if capability == available:
        pytest.skip(f"{available} is what all other tests run")
    program = """
import torch, metafast
from metafast.testing import ATTENTION_CASES, relative_error, second_order
attention = lambda b: lambda *a, **k: metafast.scaled_dot_product_attention(*a, **k, backend=b)
for case in ATTENTION_CASES:
    for dtype, bar in ((torch.bfloat16, 0.1), (torch.float32, 1e-4), (torch.float64, 1e-11)):
        inputs = case.inputs(dtype, torch.Generator().manual_seed(0))
        exact = second_order(attention("reference"), inputs.to(torch.float64))
        for name, value in second_order(attention("fused"), inputs).items():
            assert relative_error(value, exact[name]) < bar, (case.name, dtype, name)
print(metafast.build_info()["extension"]["cpu_capability"])
"""
    environment = {**os.environ, "METAFAST_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [capability]


def tensors(*shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1, *tensors((2, 4), (2, 4))), {}, TypeError, "query: expected a tensor, got int"),
        (tensors((4,), (4,), (4,)), {}, ValueError, r"query: expected at least 2 dimensions .* got shape \(4,\)"),
        (tensors((2, 4), (2, 4), (2, 4), dtype=torch.int64), {}, TypeError, "query: expected a floating dtype"),
        (tensors((2, 4), (2, 4), (2, 4)), {"enable_gqa": True}, ValueError, "query: expected at least 3 dimensions"),
        (tensors((4, 2, 4), (2, 4), (2, 4)), {"enable_gqa": True}, ValueError, "key: expected at least 3 dimensions"),
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
        (
            tensors((4, 2, 4), (2, 2, 4), (3, 2, 4)),
            {"enable_gqa": True},
            ValueError,
            "value: expected a number of heads",
        ),
        (tensors((1, 2, 4), (4, 2, 4), (4, 2, 4)), {"enable_gqa": True}, ValueError, "key: expected a number of heads"),
        (tensors((1, 2, 4), (4, 2, 4), (2, 2, 4)), {}, ValueError, "value: expected query's 1 heads"),
        (tensors((2, 1, 2, 4), (2, 4), (3, 1, 2, 4)), {}, ValueError, "value: expected leading dimensions"),
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
        (
            tensors((2, 4), (4, 4), (4, 4)),
            {"attn_mask": causal_lower_right(2, 3)},
            ValueError,
            r"attn_mask: expected a causal bias of the lengths \(2, 4\), got one of \(2, 3\)",
        ),
        (tensors((2, 4), (3, 4), (3, 4)), {"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability"),
        (tensors((2, 4), (3, 4), (3, 4)), {"window_size": 3}, TypeError, "window_size: expected a pair"),
        (tensors((2, 4), (3, 4), (3, 4)), {"window_size": (1, 2.0)}, TypeError, "window_size: expected integers"),
        (tensors((2, 4), (3, 4), (3, 4)), {"window_size": (1, -2)}, ValueError, "window_size: expected numbers of at"),
        (
            tensors((2, 4), (3, 4), (3, 4)),
            {"query_offset": 1.0},
            TypeError,
            "query_offset: expected an integer, got 1.0",
        ),
        (tensors((2, 4), (3, 4), (3, 4)), {"key_start": 1}, TypeError, "key_start: expected a tensor or None, got int"),
        (
            tensors((2, 4), (3, 4), (3, 4)),
            {"key_length": torch.tensor(1.0)},
            TypeError,
            "key_length: expected an integer dtype, got torch.float32",
        ),
        (
            tensors((2, 4), (3, 4), (3, 4)),
            {"key_length": torch.tensor(1, device="meta")},
            ValueError,
            "key_length: expected query's device cpu, got meta",
        ),
        (
            tensors((2, 1, 2, 4), (2, 1, 3, 4), (2, 1, 3, 4)),
            {"key_start": torch.tensor([1, 2, 3])},
            ValueError,
            r"key_start: expected a shape that broadcasts to the leading dimensions \(2,\), .* got \(3,\)",
        ),
        (tensors((2, 4), (3, 4), (3, 4)), {"backend": "quick"}, ValueError, "backend: expected one of 'auto', 'fused'"),
    ],
)
def test_bad_arguments(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*arguments, **options)


def test_fused_on_request_only_or_with_every_reason() -> None:
    q = torch.zeros(1, 2, 4, device="meta")
    with pytest.raises(metafast.BackendUnavailableError, match="no kernels for device 'meta'"):
        scaled_dot_product_attention(q, q, q, backend="fused")
    assert scaled_dot_product_attention(q, q, q).shape == q.shape


def test_second_order_runs_each_pass_once() -> None:
    query, key, value, grad_out = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(4))
    with torch.profiler.profile(acc_events=True) as profile:
        out = scaled_dot_product_attention(query, key, value, backend="fused")
        grads = torch.autograd.grad(out, (query, key, value), grad_out, create_graph=True)
        torch.autograd.grad(grads, (query, key, value, grad_out), [torch.ones_like(g) for g in grads])
    runs = {event.key: event.count for event in profile.key_averages() if event.key.startswith("metafast::attention")}
    passes = ("attention_forward", "attention_backward", "attention_backward_jvp")
    assert runs == {f"metafast::{name}": 1 for name in passes}
