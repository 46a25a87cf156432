"""Which shapes attention takes, and what comes of them: torch's math backend is the judge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.testing import relative_error

pytestmark = pytest.mark.usefixtures("fused_cpu")

# Leading dimensions of query, key and value, of the mask, and whether heads are grouped.
TAKEN = [
    ((2, 4), (2, 1), (2, 1), None, False),
    ((2, 4), (2, 4), (2, 1), None, False),
    ((2, 4), (2, 1), (2, 4), None, False),
    ((2, 1), (2, 4), (2, 4), None, False),
    ((2, 1), (2, 4), (2, 1), None, False),
    ((2, 1), (2, 1), (2, 4), None, False),
    ((1, 4), (3, 1), (1, 1), None, False),
    ((2, 4), (), (), None, False),
    ((), (2, 4), (2, 4), None, False),
    ((4,), (2, 4), (2, 4), None, False),
    ((2, 4), (4,), (), None, False),
    ((), (), (3,), None, False),
    ((), (), (2, 3), None, False),
    ((), (2,), (3, 2), None, False),
    ((2, 3, 4), (4,), (3, 1), None, False),
    ((), (), (), (), False),
    ((), (), (3,), (), False),
    ((2, 4), (2, 1), (2, 1), (4,), False),
    ((2, 1), (2, 4), (2, 4), (2, 4), False),
    ((2, 1), (2, 4), (2, 4), (2, 1), False),
    ((2, 1), (2, 1), (2, 4), (2, 1), False),
    ((4,), (2, 4), (2, 4), (2, 1), False),
    ((2, 4), (2, 2), (2, 2), None, True),
    ((2, 4), (2, 2), (2, 4), None, True),
    ((2, 4), (2, 2), (2, 1), None, True),
    ((2, 4), (2, 1), (2, 2), None, True),
    ((2, 6), (2, 3), (2, 2), (2, 6), True),
    ((2, 4), (2,), (2,), None, True),
    ((4,), (2, 1), (2, 1), None, True),
]
REFUSED = [
    ((2, 4), (2, 2), (2, 2), None, False, "key"),
    ((2, 4), (2, 2), (2, 4), None, False, "key"),
    ((2, 4), (2, 4), (2, 2), None, False, "value"),
    ((2, 4), (3, 4), (2, 4), None, False, "key"),
    ((2, 4), (2, 4), (3, 4), None, False, "value"),
    ((2, 4), (2, 3), (2, 3), None, True, "key"),
    ((2, 4), (2, 2), (2, 3), None, True, "value"),
    ((2, 2), (2, 4), (2, 4), None, True, "key"),
    ((), (), (), None, True, "query"),
    ((2, 4), (), (), None, True, "key"),
    ((4,), (4,), (4,), (2, 4), False, "attn_mask"),
    ((), (), (), (3,), False, "attn_mask"),
    ((), (), (3,), (3,), False, "attn_mask"),
    ((2, 1), (2, 1), (2, 4), (2, 4), False, "attn_mask"),
    ((1, 4), (1, 4), (1, 4), (3, 1), False, "attn_mask"),
]


def drawn(leads, mask, generator, tasks=()):
    shapes = [(*tasks, *lead, *size) for lead, size in zip(leads, ((5, 3), (6, 3), (6, 2)), strict=True)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    if mask is not None:
        tensors.append(torch.randn(*tasks, *mask, 5, 6, generator=generator, dtype=torch.float64))
    return [x.requires_grad_() for x in tensors]


def torchs(*tensors, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors, **options)


def second_order(function, tensors, cotangents):
    out = function(*tensors)
    grads = torch.autograd.grad(out, tensors, cotangents(out), create_graph=True, materialize_grads=True)
    products = sum((g * cotangents(g)).sum() for g in grads)
    return out, *grads, *torch.autograd.grad(products, tensors, materialize_grads=True)


def cotangents(like):
    return torch.linspace(-1, 2, like.numel(), dtype=like.dtype).reshape(like.shape)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(("query", "key", "value", "mask", "grouped"), TAKEN, ids=str)
def test_taken(query, key, value, mask, grouped, backend, generator):
    tensors = drawn((query, key, value), mask, generator)
    options = {"enable_gqa": grouped}
    expected = second_order(lambda *x: torchs(*x, **options), tensors, cotangents)
    found = second_order(
        lambda *x: metafast.scaled_dot_product_attention(*x, **options, backend=backend), tensors, cotangents
    )
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-11 or (a - b).abs().max() < 1e-13


@pytest.mark.parametrize(("key_heads", "grouped"), [(1, False), (0, False), (1, True)])
def test_no_heads(key_heads, grouped, generator):
    tensors = drawn(((2, 0), (2, key_heads), (2, key_heads)), None, generator)
    out = metafast.scaled_dot_product_attention(*tensors, enable_gqa=grouped)
    assert out.shape == torchs(*tensors, enable_gqa=grouped).shape
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize(("query", "key", "value", "mask", "grouped", "name"), REFUSED, ids=str)
def test_refused(query, key, value, mask, grouped, name, generator):
    tensors = drawn((query, key, value), mask, generator)
    with pytest.raises((RuntimeError, IndexError)):
        torchs(*tensors, enable_gqa=grouped)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        metafast.scaled_dot_product_attention(*tensors, enable_gqa=grouped)


@pytest.mark.parametrize(("query", "key", "value", "mask", "grouped"), TAKEN[::3], ids=str)
def test_tasks_side_by_side(query, key, value, mask, grouped, generator):
    tensors = drawn((query, key, value), mask, generator, tasks=(2,))
    # One tensor is the same for both tasks.
    tensors[1] = tensors[1][0]
    in_dims = tuple(None if i == 1 else 0 for i in range(len(tensors)))

    def gradients(function):
        def loss(*x):
            return function(*x, enable_gqa=grouped).pow(3).sum()

        inner = grad(lambda *x: sum(g.pow(2).sum() for g in grad(loss, (0, 1, 2))(*x)), (0, 1, 2))
        return vmap(inner, in_dims)(*tensors)

    found, expected = gradients(metafast.scaled_dot_product_attention), gradients(torchs)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-10 or (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("dropped", [0.0, 0.4])
def test_one_head_of_keys_is_not_copied(dropped, generator, monkeypatch):
    seen = []
    kernels = metafast.ops.attention.autograd.attention
    monkeypatch.setattr(
        metafast.ops.attention.autograd, "attention", lambda *args: seen.append(args[:3]) or kernels(*args)
    )
    query, key, value = drawn(((2, 4), (2, 1), (2, 1)), None, generator)
    metafast.scaled_dot_product_attention(query, key, value, dropout_p=dropped)
    metafast.scaled_dot_product_attention(query, query, value[..., :5, :], dropout_p=dropped)
    assert [tuple(key.shape[:2]) for _, key, _ in seen] == [(2, 1), (2, 4)]
    assert seen[0][1].data_ptr() == key.data_ptr()
    assert seen[1][2].stride(1) == 0
