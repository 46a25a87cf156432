"""The Triton kernels of attention against dense attention in float64, differentiated by torch.autograd.

On a machine without CUDA they run in Triton's interpreter, with the same cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it while it is imported

from metafast.ops.attention import triton as kernels  # noqa: E402
from metafast.ops.attention.triton.interpreter import mend_interpreter  # noqa: E402
from metafast.ops.attention.triton.launch import Problem  # noqa: E402

if not CUDA:
    mend_interpreter()
DEVICE = torch.device("cuda" if CUDA else "cpu")

# A fused result may have twice the error of eager attention in the same dtype, and a millionth of the largest element
# besides: float32 results of a few terms are often exact in eager attention by luck.
ALLOWED_RATIO = 2.0
FLOOR = 1e-6


@dataclass(frozen=True)
class Case:
    """One call of attention; ``mask`` and ``layout`` name entries of MASKS and LAYOUTS."""

    name: str
    n_queries: int
    n_keys: int
    head_dim: int = 16
    value_dim: int | None = None
    lead: tuple[int, ...] = ()
    heads: int = 2
    kv_heads: int | None = None
    mask: str | None = None
    is_causal: bool = False
    scale: float | None = None
    layout: str = "contiguous"
    key_offset: float = 0.0

    def sizes(self) -> tuple[int, int, int]:
        """Key heads, value dimension and the scale in use."""
        return self.kv_heads or self.heads, self.value_dim or self.head_dim, self.scale or self.head_dim**-0.5


MASKS: dict[str, Callable[[Case], Tensor]] = {
    "pairs": lambda case: random_mask(case.n_queries, case.n_keys),
    "every pair": lambda case: random_mask(*case.lead, case.heads, case.n_queries, case.n_keys),
    "keys of a batch": lambda case: random_mask(*case.lead, 1, 1, case.n_keys),
    "keys of a head": lambda case: random_mask(case.heads, 1, case.n_keys),
    "whole rows": lambda case: random_mask(case.n_queries, 1),
    "outer lead": lambda case: random_mask(case.lead[0], *(1 for _ in case.lead[1:]), 1, case.n_queries, case.n_keys),
    "inner lead": lambda case: random_mask(*case.lead[1:], case.heads, 1, case.n_keys),
    "middle lead": lambda case: random_mask(1, case.lead[1], 1, 1, 1, case.n_keys),
    "outermost and innermost lead": lambda case: random_mask(case.lead[0], 1, case.lead[2], 1, 1, case.n_keys),
    "expanded": lambda case: random_mask(case.n_keys).expand(*case.lead, case.heads, case.n_queries, case.n_keys),
    "transposed": lambda case: random_mask(case.n_keys, case.n_queries).mT,
    "nothing": lambda case: torch.zeros(case.n_queries, case.n_keys, dtype=torch.bool),
    "additive": lambda case: additive(random_mask(case.n_queries, case.n_keys), -torch.inf),
    "additive of a batch": lambda case: additive(random_mask(*case.lead, 1, 1, case.n_keys), -torch.inf),
    "additive half": lambda case: additive(random_mask(case.heads, case.n_queries, case.n_keys), -torch.inf).bfloat16(),
    "additive lowest": lambda case: additive(some_allowed(case), torch.finfo(torch.float32).min),
}


def random_mask(*shape: int) -> Tensor:
    """Boolean; of several rows the second may attend to nothing."""
    mask = torch.rand(shape) < 0.7
    if len(shape) > 1 and shape[-2] > 1:
        mask[..., 1, :] = False
    return mask


def some_allowed(case: Case) -> Tensor:
    mask = torch.rand(case.n_queries, case.n_keys) < 0.5
    mask[:, 0] = True
    return mask


def additive(mask: Tensor, forbidden: float) -> Tensor:
    return torch.randn(mask.shape).masked_fill(~mask, forbidden)


def embedded(tensor: Tensor) -> Tensor:
    """The same values inside a larger tensor of NaN: whatever is read outside shows."""
    rows, columns = tensor.shape[-2:]
    around = torch.full((*tensor.shape[:-2], rows + 5, columns + 3), torch.nan, dtype=tensor.dtype)
    view = around[..., 2 : 2 + rows, 1 : 1 + columns]
    view.copy_(tensor)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "sequence before heads": lambda tensor: tensor.transpose(-2, -3).contiguous().transpose(-2, -3),
    "columns apart": lambda tensor: tensor.mT.contiguous().mT,
    "first lead last": lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    "leads swapped": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "batch broadcast": lambda tensor: tensor[:1].expand_as(tensor),
    "embedded": embedded,
}

CASES = [
    Case("plain", 64, 64, 64),
    Case("ragged", 13, 9, lead=(2,)),
    Case("ragged over several blocks", 70, 130, layout="embedded"),
    Case("one head", 9, 13, heads=1),
    Case("single query", 1, 37),
    Case("single key", 7, 1),
    Case("width 1", 5, 6, head_dim=1),
    Case("width 5, values 3", 11, 12, head_dim=5, value_dim=3, layout="embedded"),
    Case("width 40, values 64", 20, 33, head_dim=40, value_dim=64),
    Case("width 64, values 5", 20, 33, head_dim=64, value_dim=5),
    Case("width 256", 17, 20, head_dim=256, heads=1),
    Case("causal", 70, 70, is_causal=True),
    Case("causal, more keys", 9, 130, is_causal=True),
    Case("causal, more queries", 130, 9, is_causal=True),
    Case("causal and masked", 40, 40, lead=(2,), is_causal=True, mask="keys of a batch"),
    Case("grouped heads", 33, 21, heads=4, kv_heads=2),
    Case("one key head", 20, 70, heads=3, kv_heads=1, mask="every pair", is_causal=True),
    Case("mask of pairs", 70, 66, mask="pairs", layout="embedded"),
    Case("mask of every pair", 13, 17, lead=(2,), mask="every pair"),
    Case("mask of a batch's keys", 13, 17, lead=(2,), heads=1, mask="keys of a batch"),
    Case("mask of a head's keys", 13, 17, mask="keys of a head"),
    Case("mask of whole rows", 13, 17, mask="whole rows"),
    Case("mask of outer lead", 5, 9, lead=(2, 2), heads=1, mask="outer lead"),
    Case("mask of inner lead", 5, 9, lead=(2, 2), mask="inner lead"),
    Case("mask of middle lead", 5, 9, lead=(2, 2, 2), heads=1, mask="middle lead"),
    Case("mask of outermost and innermost lead", 5, 9, lead=(2, 2, 2), heads=1, mask="outermost and innermost lead"),
    Case("mask already expanded", 13, 17, lead=(2,), heads=1, mask="expanded"),
    Case("mask transposed", 13, 17, mask="transposed"),
    Case("mask of nothing", 5, 9, mask="nothing"),
    Case("additive mask", 70, 66, mask="additive"),
    Case("additive mask of a batch", 13, 17, lead=(2,), heads=1, mask="additive of a batch"),
    Case("additive mask in bfloat16", 13, 17, mask="additive half"),
    Case("additive mask of the lowest number", 13, 17, mask="additive lowest"),
    Case("sequence before heads", 13, 17, lead=(2,), layout="sequence before heads"),
    Case("columns apart", 13, 17, layout="columns apart"),
    Case("first lead last", 5, 9, lead=(2, 2), heads=1, layout="first lead last"),
    Case("leads swapped", 5, 9, lead=(2, 3), heads=1, layout="leads swapped"),
    Case("batch broadcast", 5, 9, lead=(2,), layout="batch broadcast"),
    Case("scale", 13, 17, scale=0.7),
    Case("negative scale", 13, 17, scale=-0.3),
    Case("large common offset of keys", 70, 66, 64, heads=1, key_offset=30.0),
]
HALF_CASES = [
    replace(case, name=f"{case.name}, wide", head_dim=64)
    for case in CASES
    if case.name in ("ragged", "causal", "grouped heads", "additive mask")
] + [case for case in CASES if case.name in ("plain", "width 5, values 3", "large common offset of keys")]


@dataclass
class Inputs:
    """Arguments of the raw ops, on the CPU in float64 but with values that the tested dtype holds exactly."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    tangent_query: Tensor
    tangent_key: Tensor
    tangent_value: Tensor
    tangent_grad_out: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(sum(map(ord, case.name)))
    kv_heads, value_dim, scale = case.sizes()

    def random(heads: int, rows: int, columns: int) -> Tensor:
        return LAYOUTS[case.layout](torch.randn(*case.lead, heads, rows, columns).to(dtype).double())

    query, tangent_query = (random(case.heads, case.n_queries, case.head_dim) for _ in range(2))
    key, tangent_key = (random(kv_heads, case.n_keys, case.head_dim) for _ in range(2))
    value, tangent_value = (random(kv_heads, case.n_keys, value_dim) for _ in range(2))
    grad_out, tangent_grad_out = (random(case.heads, case.n_queries, value_dim) for _ in range(2))
    if case.key_offset:
        offset = case.key_offset * torch.randn(case.head_dim)
        key, tangent_key = ((tensor + offset).to(dtype).double() for tensor in (key, tangent_key))
    return Inputs(
        query,
        key,
        value,
        grad_out,
        tangent_query,
        tangent_key,
        tangent_value,
        tangent_grad_out,
        None if case.mask is None else MASKS[case.mask](case),
        case.is_causal,
        scale,
    )


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the inputs' dtype; rows that may attend to nothing give zero."""
    group = query.shape[-3] // key.shape[-3]
    key, value = (tensor.repeat_interleave(group, -3) for tensor in (key, value))
    scores = scale * (query @ key.mT)
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
    if is_causal:
        allowed = allowed.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:
        allowed = allowed & (attn_mask != -torch.inf)
        scores = scores + attn_mask.masked_fill(attn_mask == -torch.inf, 0).to(scores.dtype)
    some = allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed & some, -torch.inf)
    weights = scores.softmax(-1) * some
    return weights @ value, scores.logsumexp(-1).masked_fill(~some.squeeze(-1), -torch.inf)


def dense_results(inputs: Inputs, dtype: torch.dtype, with_tangent_grad_out: bool) -> dict[str, Tensor]:
    """Everything the raw ops return, by autograd through dense attention in ``dtype``."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_()

    query, key, value, grad_out = map(cast, (inputs.query, inputs.key, inputs.value, inputs.grad_out))
    primals = (query, key, value)
    tangents = tuple(map(cast, (inputs.tangent_query, inputs.tangent_key, inputs.tangent_value)))
    arguments = (inputs.attn_mask, inputs.is_causal, inputs.scale)
    out, lse = dense_attention(*primals, *arguments)
    gradients = torch.autograd.grad(out, primals, grad_out, create_graph=True)
    (tangent_out,) = torch.autograd.grad(gradients, grad_out, tangents, retain_graph=True)
    # The tangent of the log-sum-exp, like that of the output, is the derivative of a pullback in its cotangent.
    grad_lse = torch.ones_like(lse, requires_grad=True)
    (mu,) = torch.autograd.grad(
        torch.autograd.grad(lse, (query, key), grad_lse, create_graph=True), grad_lse, tangents[:2]
    )
    outputs, cotangents = gradients, tangents
    if with_tangent_grad_out:
        outputs, cotangents = (*gradients, out), (*tangents, cast(inputs.tangent_grad_out))
    second = torch.autograd.grad(outputs, primals, cotangents)
    results = {"out": out, "lse": lse, "tangent_out": tangent_out, "mu": mu}
    names = ("query", "key", "value")
    results |= {f"grad_{name}": tensor for name, tensor in zip(names, gradients, strict=True)}
    results |= {f"tangent_grad_{name}": tensor for name, tensor in zip(names, second, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def kernel_results(case: Case, inputs: Inputs, dtype: torch.dtype, with_tangent_grad_out: bool) -> dict[str, Tensor]:
    """The same from the kernels, which get the case's strides and only see ``out`` and ``lse`` of their own."""

    def place(tensor: Tensor) -> Tensor:
        return LAYOUTS[case.layout](tensor.to(dtype)).to(DEVICE)

    primals = tuple(map(place, (inputs.query, inputs.key, inputs.value)))
    tangents = tuple(map(place, (inputs.tangent_query, inputs.tangent_key, inputs.tangent_value)))
    grad_out = place(inputs.grad_out)
    tangent_grad_out = place(inputs.tangent_grad_out) if with_tangent_grad_out else None
    arguments = (None if inputs.attn_mask is None else inputs.attn_mask.to(DEVICE), inputs.is_causal, inputs.scale)
    out, lse = kernels.forward(*primals, *arguments)
    gradients = kernels.backward(grad_out, *primals, out, lse, *arguments)
    tangent_out, mu = kernels.jvp(*primals, out, lse, *tangents, *arguments)
    both = kernels.backward_jvp(grad_out, *primals, out, lse, *tangents, tangent_grad_out, *arguments)
    torch.testing.assert_close(both[0], tangent_out, rtol=0, atol=0)
    results = {"out": out, "lse": lse, "tangent_out": tangent_out, "mu": mu}
    names = ("query", "key", "value")
    for name, primal, gradient, second in zip(names, primals, gradients, both[1:], strict=True):
        assert gradient.shape == second.shape == primal.shape
        assert gradient.dtype == second.dtype == dtype
        results |= {f"grad_{name}": gradient, f"tangent_grad_{name}": second}
    assert out.dtype == tangent_out.dtype == dtype
    assert lse.dtype == mu.dtype == torch.float32
    return {name: tensor.cpu() for name, tensor in results.items()}


def errors(case: Case, dtype: torch.dtype, with_tangent_grad_out: bool) -> dict[str, tuple[float, float, float]]:
    """Largest error of the kernels and of eager attention against float64, and the largest element, for each result."""
    inputs = make_inputs(case, dtype)
    exact = dense_results(inputs, torch.float64, with_tangent_grad_out)
    eager = dense_results(inputs, dtype, with_tangent_grad_out)
    fused = kernel_results(case, inputs, dtype, with_tangent_grad_out)
    found = {}
    for name, reference in exact.items():
        assert fused[name].shape == reference.shape, name
        finite = reference != -torch.inf  # the log-sum-exp of a row that may attend to nothing
        assert torch.equal(fused[name] != -torch.inf, finite), name
        assert not fused[name].isnan().any(), name
        reference = reference[finite]
        largest = reference.abs().max().item() if reference.numel() else 0.0
        error, eager_error = (
            (tensor[finite].double() - reference).abs().max().item() if reference.numel() else 0.0
            for tensor in (fused[name], eager[name])
        )
        found[name] = (error, eager_error, largest)
    return found


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills new memory with NaN, so that an element that no kernel writes shows."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return poisoned

    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, poison(getattr(torch, name)))
        yield


def assert_close_to_exact(case: Case, dtype: torch.dtype, with_tangent_grad_out: bool) -> None:
    for name, (error, eager_error, largest) in errors(case, dtype, with_tangent_grad_out).items():
        allowed = ALLOWED_RATIO * eager_error + FLOOR * max(largest, 1.0)
        assert error <= allowed, f"{name}: error {error:.2e}, eager {eager_error:.2e}, largest element {largest:.2e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    assert_close_to_exact(case, torch.float32, with_tangent_grad_out=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    assert_close_to_exact(case, dtype, with_tangent_grad_out=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_without_tangent_of_grad_out(dtype: torch.dtype) -> None:
    """None is a zero tangent: double backward."""
    case = Case("double backward", 40, 33, is_causal=True, mask="pairs")
    assert_close_to_exact(case, dtype, with_tangent_grad_out=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_common_offset_of_keys_costs_no_digits(dtype: torch.dtype) -> None:
    """Half-precision rounding of dS and of its tangent must not be multiplied by what all keys have in common."""
    case = next(case for case in CASES if case.key_offset)
    offset, centred = errors(case, dtype, True), errors(replace(case, key_offset=0.0), dtype, True)
    for name in ("grad_query", "tangent_grad_query", "tangent_out"):
        assert offset[name][0] <= 3 * centred[name][0], name


@pytest.mark.parametrize("name", ["contiguous", "sequence before heads", "leads swapped"])
def test_results_have_the_memory_order_of_what_they_belong_to(name: str) -> None:
    query, key, value = (LAYOUTS[name](torch.randn(2, 2, 2, rows, 16)).to(DEVICE) for rows in (5, 7, 7))
    options = (None, False, 0.25)
    out, lse = kernels.forward(query, key, value, *options)
    gradients = kernels.backward(out, query, key, value, out, lse, *options)
    second = kernels.backward_jvp(out, query, key, value, out, lse, query, key, value, None, *options)
    joinable = name != "leads swapped"  # leading dimensions that cannot be joined come back contiguous
    for result, like in zip((out, *gradients, *second), (query, query, key, value) * 2, strict=True):
        assert result.stride() == (torch.empty_like(like) if joinable else like.contiguous()).stride()


def test_no_batch() -> None:
    query, key = torch.randn(0, 2, 5, 16, device=DEVICE), torch.randn(0, 2, 7, 16, device=DEVICE)
    out, lse = kernels.forward(query, key, key, None, False, 0.25)
    gradients = kernels.backward(out, query, key, key, out, lse, None, False, 0.25)
    assert out.shape == query.shape
    assert lse.shape == (0, 2, 5)
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize("mask", ["keys of a batch", "outer lead", "inner lead", "expanded", "transposed"])
def test_masks_are_read_where_they_are(mask: str) -> None:
    """However far a mask is broadcast, the kernels read the caller's memory."""
    case = Case("mask", 5, 9, lead=(2, 3), mask=mask)
    tensor = MASKS[mask](case)
    query, key = torch.zeros(2, 3, 2, 5, 4), torch.zeros(2, 3, 2, 9, 4)
    described = Problem(query, key, key, tensor, False, 1.0).mask
    assert described is not None
    assert described.pointer.data_ptr() == tensor.data_ptr()


def test_results_are_bitwise_reproducible() -> None:
    case = Case("reproducible", 40, 70, heads=2, kv_heads=1)
    inputs = make_inputs(case, torch.float32)
    first, second = (kernel_results(case, inputs, torch.float32, True) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs the memory of a GPU")
def test_offsets_beyond_32_bits() -> None:
    """The last rows of a batch, and the second batch, lie more than 2³¹ elements into their tensor."""
    rows, width, row_stride = 300, 16, 2**23
    storage = torch.zeros(2 * rows * row_stride, dtype=torch.float16, device=DEVICE)
    query = storage.as_strided((2, 1, rows, width), (rows * row_stride, width, row_stride, 1))
    query.copy_(torch.randn(query.shape))
    options = (None, False, 0.25)
    far, near = kernels.forward(query, query, query, *options), kernels.forward(*(query.contiguous(),) * 3, *options)
    torch.testing.assert_close(far[0], near[0], rtol=0, atol=0)
    torch.testing.assert_close(far[1], near[1], rtol=0, atol=0)
