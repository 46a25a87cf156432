"""The ops' overloads that write into given tensors, wherever these lie: a captured step makes results inside of stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metafast
from metafast.backend import extension
from metafast.ops.attention.options import NO_LIMIT
from metafast.program import Program
from metafast.testing import AttentionCase

pytestmark = pytest.mark.skipif(extension() is None, reason="the overloads of the CPU are the extension's")
ops = torch.ops.metafast


def attention(name: str) -> Callable[[torch.dtype, torch.Generator], tuple[Any, ...]]:
    def arguments(dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        inputs = AttentionCase("", 5, 6, 4, mask="bias of heads").inputs(dtype, generator)
        # One sequence's last key and the other's first do not exist.
        columns = inputs.qkv[1].shape[-2]
        ranges = torch.tensor([[0, columns - 1], [1, columns]])
        options = (inputs.options["attn_mask"][None], torch.tensor([3, -4]), ranges, 2, NO_LIMIT, 0.25, 0.5)
        if name == "attention_forward":
            return *inputs.qkv, *options
        saved = (*inputs.qkv, *ops.attention_forward(*inputs.qkv, *options))
        directions = (*inputs.tangents, inputs.tangent_mask[None])
        if name == "attention_jvp":
            return *saved, *directions, *options
        if name.endswith("_jvp"):
            return inputs.grad_out, *saved, *directions, None, *options
        return inputs.grad_out, *saved, *options

    return arguments


def drawn(*shapes: tuple[int, ...]) -> Callable[[torch.dtype, torch.Generator], tuple[Any, ...]]:
    return lambda dtype, generator: tuple(torch.randn(s, generator=generator, dtype=dtype) for s in shapes)


def products(dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    start, *factors = drawn((2, 1, 19), (2, 7, 5), (2, 7, 3), (2, 5, 19), (2, 3, 19))(dtype, generator)
    return start, factors[:2], factors[2:]


ROWS, WEIGHTS, STATISTICS = (2, 7, 5), (2, 5), (2, 7, 2)
CASES = {
    name: attention(name)
    for name in (
        "attention_forward",
        "attention_backward",
        "attention_jvp",
        "attention_backward_jvp",
        "attention_mask_backward",
        "attention_mask_backward_jvp",
    )
} | {
    "gelu_backward": drawn(ROWS, ROWS),
    "gelu_double_backward": drawn(ROWS, ROWS, ROWS),
    "layer_norm_forward": lambda *how: (*drawn(ROWS, WEIGHTS, WEIGHTS)(*how), 1e-5),
    "layer_norm_backward": drawn(ROWS, ROWS, WEIGHTS, STATISTICS),
    "layer_norm_backward_jvp": drawn(ROWS, ROWS, WEIGHTS, STATISTICS, ROWS, WEIGHTS, WEIGHTS),
    "sum_of_products": products,
}


# The kernels of the small ops take no half types.
TYPES = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if name.startswith("attention") or dtype != torch.bfloat16
]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize(("name", "dtype"), TYPES, ids=str)
def test_write_what_the_op_returns(name: str, dim: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """And nothing beside it."""
    op, arguments = getattr(ops, name), CASES[name](dtype, generator)
    results = op(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    stacks = [torch.stack([torch.full_like(result, 9.0)] * 3, dim) for result in results]
    assert op.out(*arguments, **{f"out{i}": stack.select(dim, 1) for i, stack in enumerate(stacks)}) is None
    for stack, result in zip(stacks, results, strict=True):
        before, written, after = stack.unbind(dim)
        assert torch.equal(written, result)
        assert (before == 9.0).all()
        assert (after == 9.0).all()


def test_every_op_is_here() -> None:
    """Updates excepted, which are tested where they are, and refuse results that are not contiguous."""
    names = {
        name.removeprefix("metafast::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("metafast::")
    }
    written = {name.removesuffix(".out") for name in names if name.endswith(".out")}
    assert {name for name in written if "update" not in name} == set(CASES)


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("name", [name for name in CASES if name != "sum_of_products"])
def test_stacked_by_a_program(name: str, dim: int, generator: torch.Generator) -> None:
    arguments = CASES[name](torch.float32, generator)
    tensors = [value for value in arguments if isinstance(value, Tensor)]

    def stacked(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        results = getattr(ops, name)(*(next(given) if isinstance(value, Tensor) else value for value in arguments))
        first = results if isinstance(results, Tensor) else results[0]
        return torch.stack([first, first.clone(), first + 1], dim)

    assert torch.equal(Program(stacked, tensors).run(tensors), stacked(*tensors))


@pytest.mark.parametrize("dim", [0, -1])
def test_updates_stacked_by_a_program(dim: int, generator: torch.Generator) -> None:
    rule = metafast.inner.SGD(lr=0.1, momentum=0.9)
    tensors = [torch.randn(3, 4, generator=generator) for _ in range(4)]

    def stacked(*tensors: Tensor) -> Tensor:
        params, _ = metafast.task_update(rule, list(tensors[:2]), list(tensors[2:]))
        return torch.stack(params, dim)

    assert torch.equal(Program(stacked, tensors).run(tensors), stacked(*tensors))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm alone", "instance_norm", "group_norm", "layer_norm"])
def test_norms_of_inputs_in_any_layout(name, layout, training, generator):
    """Torch's own overload of batch norm takes the memory of such an input for contiguous."""
    x = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)

    def normalised(x: Tensor, mean: Tensor, var: Tensor) -> Any:
        x = {"contiguous": x.mT.contiguous(), "transposed": x.mT, "strided": x.mT[..., ::2]}[layout]
        statistics = (mean * 1.0, var * 1.0)
        out = {
            "batch_norm": lambda: F.batch_norm(x, *statistics, training=training),
            "batch_norm alone": lambda: F.batch_norm(x, None, None, training=True),
            "instance_norm": lambda: F.instance_norm(x, *statistics, use_input_stats=training),
            "group_norm": lambda: F.group_norm(x, 2),
            "layer_norm": lambda: F.layer_norm(x, x.shape[1:]),
        }[name]()
        return out, statistics

    inputs = [x, torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)]
    with torch.no_grad():
        torch.testing.assert_close(Program(normalised, inputs).run(inputs), normalised(*inputs))
