"""The choice of a backend, and what importing the package loads."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest
import torch

import metafast
from metafast.backend import requested_backend, resolve_backend


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAVY = (
    *("triton", "transformers", "higher", "babel", "matplotlib", "safetensors", "hypothesis", "pytest"),
    *("sympy", "networkx", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "metafast._C"),
)


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys, metafast; print(*set({HEAVY}) & set(sys.modules))"
    assert run_python(code).strip() == ""


def test_works_where_triton_and_the_extension_are_missing() -> None:
    out = run_python(
        """
import sys
sys.modules["triton"] = sys.modules["metafast._C"] = None  # importing them now raises ImportError
import torch, metafast
q = torch.randn(2, 3, 4, requires_grad=True)
(g,) = torch.autograd.grad(metafast.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
print(torch.autograd.grad(g.pow(2).sum(), q)[0].shape)
params, _ = metafast.task_update(metafast.inner.SGD(lr=1.0), [torch.ones(2)], [torch.ones(3, 2)])
print(params[0].shape)
info = metafast.build_info()
print(info["extension"], info["backends"]["fused (cpu)"])
try:
    metafast.scaled_dot_product_attention(q, q, q, backend="fused")
except metafast.BackendUnavailableError as error:
    print(error)
"""
    )
    lines = out.splitlines()
    assert lines[:2] == ["torch.Size([2, 3, 4])", "torch.Size([3, 2])"]
    assert lines[2].startswith("None unusable: metafast._C does not load (")
    assert "metafast._C does not load" in lines[3]


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested_backend() == "auto"
    monkeypatch.setenv("METAFAST_BACKEND", "reference")
    assert requested_backend() == "reference"
    with metafast.use_backend("fused"):
        assert requested_backend() == "fused"
        with metafast.use_backend("auto"):
            assert requested_backend() == "auto"
        assert requested_backend() == "fused"
        assert requested_backend("reference") == "reference"
    assert requested_backend() == "reference"
    monkeypatch.setenv("METAFAST_BACKEND", "quick")
    with pytest.raises(ValueError, match="METAFAST_BACKEND: expected one of"):
        requested_backend()


def test_context_is_left_after_an_exception_and_stays_in_its_thread() -> None:
    seen = []
    with pytest.raises(KeyError), metafast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == ["auto"]
    assert requested_backend() == "auto"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'fused', 'reference', got 'cuda'"):
        metafast.use_backend("cuda")


def test_auto_logs_its_reasons_and_fused_raises_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "metafast"):
        assert resolve_backend("an op", None, ["no kernel", "wrong dtype"]) == "reference"
    assert "an op runs on the reference path: no kernel; wrong dtype" in caplog.text
    with pytest.raises(metafast.BackendUnavailableError, match=r"an op: .* no kernel; wrong dtype"):
        resolve_backend("an op", "fused", ["no kernel", "wrong dtype"])


def test_the_choice_travels_to_the_backward_pass() -> None:
    q = torch.randn(2, 3, 4, requires_grad=True)
    with metafast.use_backend("reference"):
        out = metafast.scaled_dot_product_attention(q, q, q)
    with metafast.use_backend("fused"):
        first = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), q, create_graph=True)[0]
        # The reference has a third derivative, the fused path has none.
        assert torch.autograd.grad(second.pow(2).sum(), q)[0].isfinite().all()


@pytest.mark.usefixtures("fused_cpu")
def test_build_info() -> None:
    info = metafast.build_info()
    assert info["torch"] == torch.__version__
    assert info["backends"]["fused (cpu)"] == "usable"
    assert info["extension"]["abi_target"] == "0x020b000000000000"
    assert "-O3" in info["extension"]["flags"]
