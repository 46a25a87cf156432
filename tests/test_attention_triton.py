"""The Triton kernels of attention, called as raw ops, against the dense reference in float64 under torch.autograd.

On a machine without CUDA they run in Triton's interpreter, with the same cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from some_cases import quarter, third
from torch import Tensor

from metafast.ops.attention import reference
from metafast.ops.attention.options import NO_LIMIT, Options, Told
from metafast.ops.attention.validation import checked_ranges, checked_window
from metafast.testing import ATTENTION_CASES, AttentionCase

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
NO_OPTIONS = (None, None, None, Options(left=NO_LIMIT, right=NO_LIMIT, dropout_p=0.0, scale=0.25))
NAMES = ("query", "key", "value", "mask")


@dataclass(frozen=True)
class LayoutCase:
    """A memory order or a mask that the shared table does not have; ``mask`` and ``layout`` name entries of MASKS and
    LAYOUTS."""

    name: str
    rows: int
    columns: int
    head_dim: int = 16
    value_dim: int | None = None
    lead: tuple[int, ...] = ()
    heads: int = 2
    key_heads: int | None = None
    mask: str | None = None
    window: tuple[int, int] = (NO_LIMIT, NO_LIMIT)
    dropout_p: float = 0.0
    ranges: bool = False
    scale: float | None = None
    layout: str = "contiguous"
    key_offset: float = 0.0


MASKS: dict[str, Callable[[LayoutCase], Tensor]] = {
    "pairs": lambda case: random_mask(case.rows, case.columns),
    "every pair": lambda case: random_mask(*case.lead, case.heads, case.rows, case.columns),
    "keys of a batch": lambda case: random_mask(*case.lead, 1, 1, case.columns),
    "keys of a head": lambda case: random_mask(case.heads, 1, case.columns),
    "whole rows": lambda case: random_mask(case.rows, 1),
    "outer lead": lambda case: random_mask(case.lead[0], *(1 for _ in case.lead[1:]), 1, case.rows, case.columns),
    "inner lead": lambda case: random_mask(*case.lead[1:], case.heads, 1, case.columns),
    "middle lead": lambda case: random_mask(1, case.lead[1], 1, 1, 1, case.columns),
    "outermost and innermost lead": lambda case: random_mask(case.lead[0], 1, case.lead[2], 1, 1, case.columns),
    "expanded": lambda case: random_mask(case.columns).expand(*case.lead, case.heads, case.rows, case.columns),
    "transposed": lambda case: random_mask(case.columns, case.rows).mT,
    "nothing": lambda case: torch.zeros(case.rows, case.columns, dtype=torch.bool),
    "additive": lambda case: additive(random_mask(case.rows, case.columns), -torch.inf),
    "additive of inner lead": lambda case: additive(
        random_mask(*case.lead[1:], case.heads, 1, case.columns), -torch.inf
    ),
    "additive of middle lead": lambda case: additive(random_mask(1, case.lead[1], 1, 1, 1, case.columns), -torch.inf),
    "additive of rows": lambda case: torch.randn(case.heads, case.rows, 1),
    "additive of whole rows": lambda case: additive(random_mask(case.rows, 1), -torch.inf),
    "additive of keys": lambda case: additive(random_mask(1, 1, case.columns), -torch.inf),
    "additive of one": lambda case: torch.randn(1, 1, 1),
    "additive expanded": lambda case: torch.randn(case.columns).expand(*case.lead, case.heads, case.rows, case.columns),
    "additive half": lambda case: additive(random_mask(case.heads, case.rows, case.columns), -torch.inf).bfloat16(),
}


def random_mask(*shape: int) -> Tensor:
    """Boolean; of several rows the second may attend to nothing."""
    mask = torch.rand(shape) < 0.7
    if len(shape) > 1 and shape[-2] > 1:
        mask[..., 1, :] = False
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

LAYOUT_CASES = [
    LayoutCase("ragged over several blocks", 70, 130, layout="embedded", window=(NO_LIMIT, 0)),
    LayoutCase("width 5, values 3", 11, 12, head_dim=5, value_dim=3, layout="embedded"),
    LayoutCase("width 64, values 5", 20, 33, head_dim=64, value_dim=5),
    LayoutCase("width 256", 17, 20, head_dim=256, heads=1),
    LayoutCase("one head of keys", 20, 70, heads=3, key_heads=1, mask="every pair", window=(NO_LIMIT, 0)),
    LayoutCase("mask of pairs", 70, 66, mask="pairs", layout="embedded"),
    LayoutCase("mask of a head's keys", 13, 17, mask="keys of a head"),
    LayoutCase("mask of whole rows", 13, 17, mask="whole rows"),
    LayoutCase("mask of outer lead", 5, 9, lead=(2, 2), heads=1, mask="outer lead"),
    LayoutCase("mask of inner lead", 5, 9, lead=(2, 2), mask="inner lead"),
    LayoutCase("mask of middle lead", 5, 9, lead=(2, 2, 2), heads=1, mask="middle lead"),
    LayoutCase("mask of the ends of lead", 5, 9, lead=(2, 2, 2), heads=1, mask="outermost and innermost lead"),
    LayoutCase("mask already expanded", 13, 17, lead=(2,), heads=1, mask="expanded"),
    LayoutCase("mask transposed", 13, 17, mask="transposed"),
    LayoutCase("mask of nothing", 5, 9, mask="nothing"),
    LayoutCase("additive mask", 70, 66, mask="additive", window=(10, 30), dropout_p=0.2),
    LayoutCase("additive mask of inner lead", 5, 9, lead=(2, 3), mask="additive of inner lead"),
    LayoutCase("additive mask of middle lead", 5, 9, lead=(2, 3, 2), heads=1, mask="additive of middle lead"),
    LayoutCase("additive mask of rows", 70, 66, mask="additive of rows", window=(20, 10)),
    LayoutCase("additive mask of keys", 70, 66, lead=(2,), mask="additive of keys", window=(20, 10)),
    LayoutCase("one number for a mask", 40, 70, mask="additive of one", key_heads=1),
    LayoutCase("additive mask already expanded", 5, 9, lead=(2,), mask="additive expanded"),
    LayoutCase("additive mask in bfloat16", 13, 17, mask="additive half"),
    LayoutCase("sequence before heads", 13, 17, lead=(2,), layout="sequence before heads"),
    LayoutCase("columns apart", 13, 17, layout="columns apart"),
    LayoutCase("first lead last", 5, 9, lead=(2, 2), heads=1, layout="first lead last"),
    LayoutCase("leads swapped", 5, 9, lead=(2, 3), heads=1, layout="leads swapped", dropout_p=0.3),
    LayoutCase("batch broadcast", 5, 9, lead=(2,), layout="batch broadcast"),
    LayoutCase("negative scale", 13, 17, scale=-0.3),
    LayoutCase("window of few of many", 130, 200, heads=1, window=(3, 40)),
    # Blocks that end before the first key, that begin after the last, and that no row of the block reaches.
    LayoutCase("sides before the keys", 130, 40, heads=1, window=(60, -50), mask="additive of keys"),
    LayoutCase("sides after the keys", 70, 130, window=(-70, 90), dropout_p=0.2, key_heads=1),
    LayoutCase("no key between the sides", 5, 9, window=(-3, 2), mask="additive"),
    # Blocks of which no key exists, before, after and between others, for some batches alone.
    LayoutCase("key ranges", 40, 200, lead=(3,), heads=1, ranges=True),
    LayoutCase(
        "key ranges of grouped heads", 70, 130, lead=(2,), key_heads=1, ranges=True, window=(60, 20), dropout_p=0.2
    ),
    LayoutCase("key ranges under a mask of keys", 20, 200, lead=(2, 2), heads=1, ranges=True, mask="additive of keys"),
    LayoutCase(
        "key ranges under a mask of lead", 5, 130, lead=(2, 2), heads=1, ranges=True, mask="additive of inner lead"
    ),
    LayoutCase("key ranges under one number", 20, 130, lead=(2,), heads=1, ranges=True, mask="additive of one"),
    LayoutCase("large common offset of keys", 70, 66, 64, heads=1, key_offset=30.0),
]
# The gradients of masks of one column are sums of whole rows of dS, zero but for rounding.
ONE_COLUMN_CASES = [
    LayoutCase("one key, 60 rows", 60, 1, 4, mask="additive of rows"),
    LayoutCase("one key, one number", 60, 1, 4, mask="additive of one"),
    LayoutCase("one row and key", 1, 1, mask="additive of rows"),
    LayoutCase("several blocks", 40, 130, heads=1, mask="additive of rows"),
    LayoutCase("one number", 40, 40, 8, mask="additive of one"),
    LayoutCase("some rows of nothing, dropout", 20, 40, 8, key_heads=1, mask="additive of whole rows", dropout_p=0.3),
    LayoutCase("window", 60, 60, 8, heads=1, mask="additive of rows", window=(3, 2)),
    LayoutCase("causal, offset", 33, 33, heads=1, mask="additive of whole rows", window=(NO_LIMIT, 0), key_offset=30.0),
]
HALF_CASES = [
    LayoutCase("half, plain", 64, 64, 64),
    LayoutCase("half, causal", 70, 70, 64, window=(NO_LIMIT, 0)),
    LayoutCase("half, grouped heads", 33, 21, 64, heads=4, key_heads=2, window=(9, 5)),
    LayoutCase("half, key ranges", 33, 150, 64, lead=(2,), heads=1, ranges=True),
    LayoutCase("half, additive mask", 70, 66, 64, mask="additive of keys", lead=(1,), dropout_p=0.3),
    *(case for case in LAYOUT_CASES if case.name in ("width 5, values 3", "large common offset of keys")),
    *(case for case in ONE_COLUMN_CASES if case.name in ("one key, 60 rows", "several blocks")),
]


@dataclass
class Call:
    """Arguments of the raw ops, on the CPU in float64 but with values that the tested dtype holds exactly."""

    primals: tuple[Tensor, Tensor, Tensor]
    grad_out: Tensor
    tangents: tuple[Tensor, Tensor, Tensor]
    tangent_mask: Tensor | None
    tangent_grad_out: Tensor
    options: Told
    layout: str = "contiguous"

    @property
    def attn_mask(self) -> Tensor | None:
        return self.options[0]

    @property
    def by_mask(self) -> bool:
        return self.attn_mask is not None and self.attn_mask.dtype != torch.bool


def full_rank(mask: Tensor | None, rank: int) -> Tensor | None:
    return None if mask is None else mask[(None,) * (rank - mask.dim())]


def seeds_of(lead: tuple[int, ...], dropout_p: float) -> Tensor | None:
    return torch.randint(2**63 - 1, lead) if dropout_p > 0.0 else None


def ranges_of(case: LayoutCase) -> Tensor | None:
    """Two numbers an index of lead; the last has no key, where there is another."""
    if not case.ranges:
        return None
    ranges = torch.randint(case.columns + 1, (*case.lead, 2)).sort(-1).values
    if ranges.numel() > 2:
        ranges.view(-1, 2)[-1, 0] = ranges.view(-1, 2)[-1, 1]
    return ranges


def tangent_of(mask: Tensor | None) -> Tensor | None:
    additive = mask is not None and mask.dtype != torch.bool
    return torch.randn(mask.shape).to(mask.dtype) if additive else None


def call_of_layout(case: LayoutCase, dtype: torch.dtype, draw: int = 0) -> Call:
    torch.manual_seed(sum(map(ord, case.name)) + 1000 * draw)
    key_heads, value_dim = case.key_heads or case.heads, case.value_dim or case.head_dim

    def random(heads: int, rows: int, columns: int) -> Tensor:
        return LAYOUTS[case.layout](torch.randn(*case.lead, heads, rows, columns).to(dtype).double())

    query, tangent_query = (random(case.heads, case.rows, case.head_dim) for _ in range(2))
    key, tangent_key = (random(key_heads, case.columns, case.head_dim) for _ in range(2))
    value, tangent_value = (random(key_heads, case.columns, value_dim) for _ in range(2))
    grad_out, tangent_grad_out = (random(case.heads, case.rows, value_dim) for _ in range(2))
    if case.key_offset:
        offset = case.key_offset * torch.randn(case.head_dim)
        key, tangent_key = ((tensor + offset).to(dtype).double() for tensor in (key, tangent_key))
    mask = full_rank(None if case.mask is None else MASKS[case.mask](case), query.dim())
    numbers = Options(*case.window, case.dropout_p, case.scale or case.head_dim**-0.5)
    options = (mask, seeds_of(case.lead, case.dropout_p), ranges_of(case), numbers)
    tangents = (tangent_query, tangent_key, tangent_value)
    return Call((query, key, value), grad_out, tangents, tangent_of(mask), tangent_grad_out, options, case.layout)


def call_of_shared(case: AttentionCase, dtype: torch.dtype, draw: int = 0) -> Call:
    torch.manual_seed(sum(map(ord, case.name)) + 1000 * draw)
    inputs = case.inputs(dtype, torch.default_generator)
    mask = full_rank(inputs.options["attn_mask"], inputs.query.dim())
    left, right = checked_window(case.window_size, case.is_causal, case.query_offset)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    start, length = inputs.options["key_start"], inputs.options["key_length"]
    ranges = checked_ranges(start, length, torch.Size(case.lead), case.columns, torch.device("cpu"))
    options = (mask, seeds_of(case.lead, case.dropout_p), ranges, Options(left, right, case.dropout_p, scale))
    tangent_grad_out = torch.randn(inputs.grad_out.shape).to(dtype).double()
    doubles = inputs.to(torch.float64)
    return Call(doubles.qkv, doubles.grad_out, doubles.tangents, tangent_of(mask), tangent_grad_out, options)


def dense_results(call: Call, dtype: torch.dtype, with_tangent_grad_out: bool) -> dict[str, Tensor]:
    """Everything the raw ops return, by autograd through dense attention in ``dtype``."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_()

    grad_out, primals, tangents = cast(call.grad_out), [*map(cast, call.primals)], [*map(cast, call.tangents)]
    mask, *rest = call.options
    if call.by_mask:
        # An expanded mask gets a gradient for each of its places.
        mask = cast(mask.contiguous())
        primals, tangents = [*primals, mask], [*tangents, cast(call.tangent_mask)]
    out = reference.attention(*primals[:3], mask, *rest)
    gradients = torch.autograd.grad(out, primals, grad_out, create_graph=True)
    (tangent_out,) = torch.autograd.grad(gradients, grad_out, tangents, retain_graph=True)
    outputs, cotangents = gradients, tangents
    if with_tangent_grad_out:
        outputs, cotangents = (*gradients, out), (*tangents, cast(call.tangent_grad_out))
    seconds = torch.autograd.grad(outputs, primals, cotangents)
    results = {"out": out, "tangent_out": tangent_out}
    results |= {f"grad_{name}": tensor for name, tensor in zip(NAMES, gradients, strict=False)}
    results |= {f"tangent_grad_{name}": tensor for name, tensor in zip(NAMES, seconds, strict=False)}
    return {name: tensor.detach() for name, tensor in results.items()}


def kernel_results(call: Call, dtype: torch.dtype, with_tangent_grad_out: bool) -> dict[str, Tensor]:
    """The same from the kernels, which get the case's strides and only see ``out`` and ``statistics`` of their own."""

    def place(tensor: Tensor) -> Tensor:
        return LAYOUTS[call.layout](tensor.to(dtype)).to(DEVICE)

    primals, tangents = [*map(place, call.primals)], [*map(place, call.tangents)]
    grad_out = place(call.grad_out)
    tangent_grad_out = place(call.tangent_grad_out) if with_tangent_grad_out else None
    mask, tangent_mask, seeds, ranges = (
        None if tensor is None else tensor.to(DEVICE)
        for tensor in (call.attn_mask, call.tangent_mask, *call.options[1:3])
    )
    options = (mask, seeds, ranges, *call.options[3:])
    out, statistics = kernels.forward(*primals, *options)
    assert out.dtype == dtype
    assert statistics.dtype == torch.float32
    assert statistics.shape == (*out.shape[:-1], 2)
    saved = (*primals, out, statistics)
    gradients = kernels.backward(grad_out, *saved, *options)
    tangent_out = kernels.jvp(*saved, *tangents, tangent_mask, *options)
    directions = (*tangents, tangent_mask, tangent_grad_out)
    both = kernels.backward_jvp(grad_out, *saved, *directions, *options)
    torch.testing.assert_close(both[0], tangent_out, rtol=0, atol=0)
    seconds = both[1:]
    if call.by_mask:
        primals = [*primals, mask]
        gradients = (*gradients, kernels.mask_backward(grad_out, *saved, *options))
        seconds = (*seconds, kernels.mask_backward_jvp(grad_out, *saved, *directions, *options))
    results = {"out": out, "tangent_out": tangent_out}
    for name, primal, gradient, second in zip(NAMES, primals, gradients, seconds, strict=False):
        assert gradient.shape == second.shape == primal.shape
        assert gradient.dtype == second.dtype == primal.dtype
        results |= {f"grad_{name}": gradient, f"tangent_grad_{name}": second}
    return {name: tensor.cpu() for name, tensor in results.items()}


def errors(call: Call, dtype: torch.dtype, with_tangent_grad_out: bool) -> dict[str, tuple[float, float, float]]:
    """Largest error of the kernels and of eager attention against float64, and the largest element, for each result."""
    exact = dense_results(call, torch.float64, with_tangent_grad_out)
    eager = dense_results(call, dtype, with_tangent_grad_out)
    fused = kernel_results(call, dtype, with_tangent_grad_out)
    assert fused.keys() == exact.keys()
    return {
        name: (
            (fused[name].double() - value).abs().max().item(),
            (eager[name].double() - value).abs().max().item(),
            value.abs().max().item(),
        )
        for name, value in exact.items()
    }


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


def assert_close_to_exact(*calls: Call, dtype: torch.dtype, with_tangent_grad_out: bool = True) -> None:
    """The largest errors of all calls together, which are draws of one case."""
    found = [errors(call, dtype, with_tangent_grad_out) for call in calls]
    for name in found[0]:
        error, eager_error, largest = map(max, zip(*(of_draw[name] for of_draw in found), strict=True))
        # The gradient of a mask in a lower precision than the rest is rounded to that.
        epsilon = torch.finfo(calls[0].attn_mask.dtype).eps if name.endswith("mask") else 0.0
        allowed = ALLOWED_RATIO * eager_error + max(FLOOR * max(largest, 1.0), epsilon * largest)
        assert error <= allowed, f"{name}: error {error:.2e}, eager {eager_error:.2e}, largest element {largest:.2e}"


# The interpreter takes a second for a hundred tiles; LAYOUT_CASES cross the borders of few.
SHARED_CASES = [case for case in ATTENTION_CASES if CUDA or case.rows * case.columns < 10_000]
# In these most of a result cancels, or it is a few numbers: how much rounding shows depends on the draw.
CANCELLING = ("one key", "one dimension", "causal padding", "scale", "keys with an offset", "dropout")


@pytest.mark.parametrize("case", quarter(SHARED_CASES), ids=lambda case: case.name)
def test_shared_cases(case: AttentionCase) -> None:
    assert_close_to_exact(call_of_shared(case, torch.float32), dtype=torch.float32)


@pytest.mark.parametrize("name", CANCELLING)
def test_shared_cases_on_more_draws(name: str) -> None:
    case = next(replace(case, lead=()) for case in SHARED_CASES if case.name == name)
    draws = (call_of_shared(case, torch.float32, draw) for draw in range(1, 5))
    assert_close_to_exact(*draws, dtype=torch.float32)


@pytest.mark.parametrize("case", quarter(LAYOUT_CASES), ids=lambda case: case.name)
def test_layouts_and_masks(case: LayoutCase) -> None:
    assert_close_to_exact(call_of_layout(case, torch.float32), dtype=torch.float32)


@pytest.mark.parametrize("case", third(ONE_COLUMN_CASES), ids=lambda case: case.name)
def test_masks_of_one_column(case: LayoutCase) -> None:
    draws = (call_of_layout(case, torch.float32, draw) for draw in range(3))
    assert_close_to_exact(*draws, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the NaN
def test_masks_of_one_column_show_what_is_not_finite() -> None:
    """Their gradient is zero in mathematics, but a row with NaN must not be given as zero."""
    call = call_of_layout(LayoutCase("not finite", 5, 9, mask="additive of rows"), torch.float32)
    call.grad_out[0, 1, 0], call.grad_out[1, 3, 0] = torch.nan, torch.inf
    for name, result in kernel_results(call, torch.float32, True).items():
        if name.endswith("mask"):
            bad = ~result[..., 0].isfinite()
            assert bad.nonzero().tolist() == [[0, 1], [1, 3]], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", third(HALF_CASES), ids=lambda case: case.name)
def test_half_precision(case: LayoutCase, dtype: torch.dtype) -> None:
    assert_close_to_exact(call_of_layout(case, dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_without_tangent_of_grad_out(dtype: torch.dtype) -> None:
    """None is a zero tangent: double backward."""
    case = LayoutCase("double backward", 40, 33, mask="additive", window=(NO_LIMIT, 0))
    assert_close_to_exact(call_of_layout(case, dtype), dtype=dtype, with_tangent_grad_out=False)


def test_without_tangent_of_the_mask() -> None:
    call = call_of_layout(LayoutCase("constant mask", 13, 17, mask="additive"), torch.float32)
    fused = kernel_results(replace(call, tangent_mask=None), torch.float32, True)
    zero = kernel_results(replace(call, tangent_mask=torch.zeros_like(call.attn_mask)), torch.float32, True)
    for name, result in zero.items():
        assert torch.equal(fused[name], result), name


def test_a_tangent_of_the_mask_may_have_other_sizes() -> None:
    """As under vmap, where either of the two may be the same for the whole batch."""
    case = LayoutCase("mask and tangent", 13, 40, lead=(2, 3), mask="additive of inner lead")
    call = call_of_layout(case, torch.float32)
    tangent = torch.randn(2, 1, 1, 13, 1)
    fused = kernel_results(replace(call, tangent_mask=tangent), torch.float32, True)
    expanded = tangent.expand(2, 3, 2, 13, 40)
    mask = call.attn_mask.expand(expanded.shape).contiguous()
    whole = replace(call, tangent_mask=expanded.contiguous(), options=(mask, *call.options[1:]))
    exact = dense_results(whole, torch.float64, True)
    for name in ("tangent_grad_mask", "grad_mask"):
        exact[name] = exact[name].sum((0, -2), keepdim=True)
    for name, result in fused.items():
        torch.testing.assert_close(result.double(), exact[name], rtol=1e-5, atol=1e-5, msg=name)


def test_dropout_drops_the_weights_that_the_reference_drops() -> None:
    """Bit by bit, in both orientations of a tile: equal weights of unit values show which of them are kept."""
    rows, columns, probability = 40, 150, 0.6  # above one half the threshold does not fit 31 bits
    seeds = torch.tensor([0, 2**63 - 1, 0x123456789ABCDEF])
    query, key = torch.zeros(3, 2, rows, 4), torch.zeros(3, 2, columns, 4)
    units, grad_out = (torch.eye(size).expand(3, 2, size, size).contiguous() for size in (columns, rows))
    options = (None, seeds.to(DEVICE), None, Options(left=NO_LIMIT, right=NO_LIMIT, dropout_p=probability, scale=1.0))
    query, key, units, grad_out = (tensor.to(DEVICE) for tensor in (query, key, units, grad_out))
    out, statistics = kernels.forward(query, key, units, *options)
    keep = reference.keep_mask(seeds, 2, rows, columns, probability)
    assert torch.equal(out.cpu() != 0, keep)
    # The gradient of the values is the transposed weights times this identity.
    value = torch.zeros(3, 2, columns, rows, device=DEVICE)
    out, statistics = kernels.forward(query, key, value, *options)
    grad_value = kernels.backward(grad_out, query, key, value, out, statistics, *options)[2]
    assert torch.equal(grad_value.cpu().mT != 0, keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_common_offset_of_keys_costs_no_digits(dtype: torch.dtype) -> None:
    """Half-precision rounding of dS and of its tangent must not be multiplied by what all keys have in common."""
    case = next(case for case in LAYOUT_CASES if case.key_offset)
    offset, centred = (
        errors(call_of_layout(each, dtype), dtype, True) for each in (case, replace(case, key_offset=0.0))
    )
    for name in ("grad_query", "tangent_grad_query", "tangent_out"):
        assert offset[name][0] <= 3 * centred[name][0], name


@pytest.mark.parametrize("name", ["contiguous", "sequence before heads", "leads swapped"])
def test_results_have_the_memory_order_of_what_they_belong_to(name: str) -> None:
    query, key, value = (LAYOUTS[name](torch.randn(2, 2, 2, rows, 16)).to(DEVICE) for rows in (5, 7, 7))
    out, statistics = kernels.forward(query, key, value, *NO_OPTIONS)
    saved = (out, query, key, value, out, statistics)
    gradients = kernels.backward(*saved, *NO_OPTIONS)
    second = kernels.backward_jvp(*saved, query, key, value, None, None, *NO_OPTIONS)
    joinable = name != "leads swapped"  # leading dimensions that cannot be joined come back contiguous
    for result, like in zip((out, *gradients, *second), (query, query, key, value) * 2, strict=True):
        assert result.stride() == (torch.empty_like(like) if joinable else like.contiguous()).stride()


def test_no_batch() -> None:
    query, key = torch.randn(0, 2, 5, 16, device=DEVICE), torch.randn(0, 2, 7, 16, device=DEVICE)
    options = (torch.zeros(1, 1, 5, 7, device=DEVICE), *NO_OPTIONS[1:])
    out, statistics = kernels.forward(query, key, key, *options)
    gradients = kernels.backward(out, query, key, key, out, statistics, *options)
    assert out.shape == query.shape
    assert statistics.shape == (0, 2, 5, 2)
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, key.shape]
    grad_mask = kernels.mask_backward(out, query, key, key, out, statistics, *options)
    assert torch.equal(grad_mask, torch.zeros_like(options[0]))


@pytest.mark.parametrize("mask", ["keys of a batch", "outer lead", "inner lead", "expanded", "transposed"])
def test_masks_are_read_where_they_are(mask: str) -> None:
    """However far a mask is broadcast, the kernels read the caller's memory."""
    tensor = full_rank(MASKS[mask](LayoutCase("mask", 5, 9, lead=(2, 3), mask=mask)), 5)
    query, key = torch.zeros(2, 3, 2, 5, 4), torch.zeros(2, 3, 2, 9, 4)
    described = Problem(query, key, key, tensor, *NO_OPTIONS[1:]).mask
    assert described.pointer.data_ptr() == tensor.data_ptr()


def test_results_are_bitwise_reproducible() -> None:
    case = LayoutCase("reproducible", 40, 70, key_heads=1, mask="additive of keys", dropout_p=0.1)
    call = call_of_layout(case, torch.float32)
    first, second = (kernel_results(call, torch.float32, True) for _ in range(2))
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
    far = kernels.forward(query, query, query, *NO_OPTIONS)
    near = kernels.forward(*(query.contiguous(),) * 3, *NO_OPTIONS)
    torch.testing.assert_close(far[0], near[0], rtol=0, atol=0)
    torch.testing.assert_close(far[1], near[1], rtol=0, atol=0)
