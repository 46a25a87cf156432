"""The rule of the layer ops: whatever backend is asked for, they serve a call by their kernels or by torch's own op."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

import metafast
from metafast.ops.layers import kernels
from metafast.ops.layers.gelu import gelu
from metafast.ops.layers.layer_norm import layer_norm
from metafast.ops.layers.linear import linear
from metafast.testing import relative_error

SHAPES = ((4, 5, 8), (4, 8, 8), (4, 8))  # input, weight and bias of four tasks
OPS = {
    "gelu": (gelu, F.gelu, 1),
    "layer_norm": (
        lambda x, weight, bias: layer_norm(x, (8,), weight[0], bias),
        lambda x, weight, bias: F.layer_norm(x, (8,), weight[0], bias),
        3,
    ),
    "linear": (linear, F.linear, 3),
}


def tensors(count, **kind):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(**kind) for shape in SHAPES[:count]]


@pytest.fixture
def chosen(monkeypatch):
    """What was asked and answered about kernels, op by op."""
    found = []
    reason_against_kernels = kernels.reason_against_kernels

    def recorded(*given):
        found.append(reason_against_kernels(*given))
        return found[-1]

    monkeypatch.setattr(kernels, "reason_against_kernels", recorded)
    return found


@pytest.mark.usefixtures("fused_cpu")
@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_kernels_run_where_the_reference_is_not_asked_for(name, backend, chosen) -> None:
    ours, torchs, count = OPS[name]
    given = tensors(count)
    with metafast.use_backend(backend):
        found = vmap(ours)(*given) if name == "linear" else ours(*(x[0] for x in given))
    expected = vmap(torchs)(*given) if name == "linear" else torchs(*(x[0] for x in given))
    torch.testing.assert_close(found, expected)
    assert chosen
    assert set(chosen) == {"the reference backend is asked for" if backend == "reference" else None}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [({"dtype": torch.bfloat16}, "no kernel for torch.bfloat16"), ({"device": "meta"}, "no kernel for device 'meta'")],
)
@pytest.mark.parametrize("name", OPS)
def test_the_fused_backend_takes_torchs_op_where_there_is_no_kernel_and_logs_why(name, kind, reason, caplog) -> None:
    ours, torchs, count = OPS[name]
    given = tensors(count, **kind)
    kernels._log_once.cache_clear()
    with metafast.use_backend("fused"), caplog.at_level(logging.DEBUG, "metafast"):
        for _ in range(2):
            found = vmap(ours)(*given) if name == "linear" else ours(*(x[0] for x in given))
    expected = vmap(torchs)(*given) if name == "linear" else torchs(*(x[0] for x in given))
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    if found.device.type != "meta":
        assert relative_error(found, expected) < 2**-7  # torch rounds the product before it adds the bias
    if name != "linear" or "device" in kind:  # linear may widen bfloat16, and multiply it by its kernel
        assert caplog.messages == [f"{name} runs torch's own op: {reason}"]


def test_an_accelerated_model_runs_on_the_fused_backend_whatever_its_layers_are_of() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8)).to(torch.bfloat16)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    with metafast.accelerate(model), metafast.use_backend("fused"):
        found = model(x)
    torch.testing.assert_close(found, model(x))
