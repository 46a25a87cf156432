"""The Triton kernels of attention compile for GPUs, without one: in a fresh process, since the interpreter must be off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SHARED_MEMORY = 227 * 1024  # of an H100, for one program
KERNELS = [
    "forward_kernel",
    "backward_query_kernel",
    "backward_key_kernel",
    "jvp_kernel",
    "backward_jvp_query_kernel",
    "backward_jvp_key_kernel",
    "delta_kernel",
    "mask_backward_kernel",
    "mask_backward_jvp_kernel",
]

REPORT = """
import json, torch
from metafast.ops.attention.triton.compile import compile_kernels
print(json.dumps([row._asdict() for row in compile_kernels([90], [torch.bfloat16], [64])]))
"""

# Arguments that Triton turns into constants (strides, sizes and groups of one, absent tensors) compile differently.
VARIANTS = {
    "grouped heads, additive mask of one leading dimension, causal, no tangents of mask and grad_out": """
        query, key, value = torch.zeros(2, 3, 4, 70, 64), torch.zeros(2, 3, 2, 50, 64), torch.zeros(2, 3, 2, 50, 16)
        options, tangents = (torch.ones(1, 3, 1, 1, 50), None, -1, 0, 0.0, 1.0), (None, None)
    """,
    "one key, width 1, additive mask of rows, window": """
        query, key, value = torch.zeros(1, 9, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)
        mask = torch.zeros(1, 9, 1)
        options, tangents = (mask, None, 3, 2, 0.0, 1.0), (mask, torch.zeros(1, 9, 1))
    """,
    "dropout, one number for a mask, window": """
        query = key = value = torch.zeros(2, 2, 200, 64, dtype=torch.float16)
        mask, seeds = torch.zeros(1, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
        options, tangents = (mask, seeds, 30, 20, 0.7, 1.0), (mask, query)
    """,
    "boolean mask, dropout": """
        query = key = value = torch.zeros(2, 2, 40, 32, dtype=torch.bfloat16)
        mask, seeds = torch.ones(2, 1, 40, 40, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
        options, tangents = (mask, seeds, -1, -1, 0.1, 1.0), (None, None)
    """,
}
COMPILE = """
import json, torch
from metafast.ops.attention.triton import backward, backward_jvp, forward, mask_backward, mask_backward_jvp
from metafast.ops.attention.triton.compile import compiling_for
{arguments}
with compiling_for(90) as kernels:
    out, statistics = forward(query, key, value, *options)
    saved = (out, query, key, value, out, statistics)
    directions = (query, key, value, *tangents)
    backward(*saved, *options)
    backward_jvp(*saved, *directions, *options)
    if options[0].is_floating_point():
        mask_backward(*saved, *options)
        mask_backward_jvp(*saved, *directions, *options)
print(json.dumps([[kernel.metadata.name, kernel.metadata.shared] for kernel in kernels]))
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=inherited | environment, check=False
    )


def output_of(program: str) -> Any:
    finished = run(program)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_every_kernel_compiles_for_hopper_without_spilling() -> None:
    rows = output_of(REPORT)
    assert [row["kernel"] for row in rows] == KERNELS
    for row in rows:
        assert (row["arch"], row["dtype"], row["head_dim"]) == ("sm_90", "bfloat16", 64)
        assert 0 < row["registers"] <= 255
        assert row["spills"] == 0, row
        assert 0 < row["shared"] <= SHARED_MEMORY, row


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_compile(variant: str) -> None:
    arguments = "\n".join(line.strip() for line in VARIANTS[variant].strip().splitlines())
    compiled = output_of(COMPILE.format(arguments=arguments))
    without_mask_gradient = KERNELS[:6]
    assert list(dict.fromkeys(name for name, _ in compiled)) in (KERNELS, without_mask_gradient)
    assert all(0 < shared <= SHARED_MEMORY for _, shared in compiled)


def test_the_interpreter_cannot_compile() -> None:
    program = "from metafast.ops.attention.triton.compile import compile_kernels; next(compile_kernels())"
    finished = run(program, TRITON_INTERPRET="1")
    assert finished.returncode == 1
    assert "RuntimeError: compile_kernels: expected TRITON_INTERPRET to be unset" in finished.stderr
