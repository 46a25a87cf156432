"""Compiles every attention kernel for GPUs that need not be there, and reports what each needs of one.

The raw ops themselves are called, with a stand-in for the device that compiles what they would have launched: the report
cannot disagree with the arguments, tile sizes and specialisations of a real call. Triton's interpreter must be off
(``TRITON_INTERPRET`` unset before triton is imported).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from metafast.ops.attention.options import NO_LIMIT, Options, Told
from metafast.ops.attention.triton import (
    backward,
    backward_jvp,
    forward,
    mask_backward,
    mask_backward_jvp,
)
from metafast.ops.attention.triton.launch import Device, executor
from metafast.ops.attention.triton.tiles import Config

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (64, 128)


class Compiled(NamedTuple):
    """What one kernel needs: registers and spilled bytes a thread, shared-memory bytes a program."""

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    registers: int
    spills: int
    shared: int


class _Driver:
    """As much of a Triton driver as compiling needs. Kernels are cached by device, hence a device an architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class _Target(Device):
    """Compiles for one architecture what is launched on it, and keeps the result."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.kernels: list[Any] = []

    def capability(self, device: torch.device) -> tuple[int, int] | None:
        return divmod(self.arch, 10)

    def configure(self, default: Config, device: torch.device, *_: Any) -> Config:
        return default

    def launch(self, kernel: Any, programs: int, arguments: dict[str, Any], device: torch.device) -> None:
        self.kernels.append(kernel.warmup(grid=(programs,), **arguments))


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Any]]:
    """Compiles for ``arch`` what the raw ops launch inside; yields the list of Triton's compiled kernels.

    The ops then take tensors of any device and leave their results undefined.
    """
    target, driver = _Target(arch), triton.runtime.driver
    previous = driver._active  # `driver.active` would look for a GPU
    driver.set_active(_Driver(arch))
    token = executor.set(target)
    try:
        yield target.kernels
    finally:
        executor.reset(token)
        driver.set_active(previous)


def compile_kernels(
    architectures: Iterable[int] = ARCHITECTURES,
    dtypes: Iterable[torch.dtype] = DTYPES,
    head_dims: Iterable[int] = HEAD_DIMS,
    everything: bool = False,
) -> Iterator[Compiled]:
    """One row for each kernel, architecture, dtype and head dimension, of causal attention without a mask; the kernels
    for the gradient of a mask have one.

    Args:
        architectures: compute capabilities, such as 90 for sm_90.
        dtypes: dtypes of query, key and value.
        head_dims: dimensions of a head, of values too.
        everything: with an additive mask, its tangent, dropout, key ranges and a window instead of a causal mask.

    Raises:
        RuntimeError: Triton's interpreter is on, so that there is nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile_kernels: expected TRITON_INTERPRET to be unset when triton is imported")
    for arch in architectures:
        for dtype in dtypes:
            for head_dim in head_dims:
                with compiling_for(arch) as kernels:
                    _call_ops(dtype, head_dim, everything)
                dtype_name = str(dtype).removeprefix("torch.")
                for name, compiled in _first_of_each(kernels).items():
                    registers, spills = resources(compiled)
                    shared = compiled.metadata.shared
                    yield Compiled(name, f"sm_{arch}", dtype_name, head_dim, registers, spills, shared)


def _call_ops(dtype: torch.dtype, head_dim: int, everything: bool) -> None:
    tensor, scale = torch.zeros(1, 4, 512, head_dim, dtype=dtype), head_dim**-0.5
    mask, seeds = torch.zeros(1, 4, 512, 512, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    ranges = torch.zeros(1, 2, dtype=torch.int64)
    options = Options(left=70, right=30, dropout_p=0.1, scale=scale)
    causal = Options(left=NO_LIMIT, right=0, dropout_p=0.0, scale=scale)
    masked: Told = (mask, seeds, ranges, options) if everything else (mask, None, None, causal)
    told: Told = masked if everything else (None, None, None, causal)
    out, statistics = forward(tensor, tensor, tensor, *told)
    saved = (tensor, tensor, tensor, tensor, out, statistics)
    # Mypy does not count the arguments of several tuples in one call.
    calls: tuple[tuple[Any, tuple[Any, ...]], ...] = (
        (backward, told),
        (backward_jvp, (tensor, tensor, tensor, mask if everything else None, tensor, *told)),
        (mask_backward, masked),
        (mask_backward_jvp, (tensor, tensor, tensor, mask, tensor, *masked)),
    )
    for op, rest in calls:
        op(*saved, *rest)


def _first_of_each(kernels: list[Any]) -> dict[str, Any]:
    """By name: the passes for masks repeat the JVP, with a mask then."""
    first: dict[str, Any] = {}
    for compiled in kernels:
        first.setdefault(compiled.metadata.name, compiled)
    return first


def print_report(rows: Iterable[Compiled]) -> None:
    """Prints rows as they come."""
    print(f"{'kernel':<28}{'arch':<8}{'dtype':<10}{'head dim':>8}{'registers':>11}{'spills':>8}{'shared':>9}")
    for row in rows:
        print(
            f"{row.kernel:<28}{row.arch:<8}{row.dtype:<10}{row.head_dim:>8}"
            f"{row.registers:>11}{row.spills:>8}{row.shared:>9}",
            flush=True,
        )


def resources(compiled: Any) -> tuple[int, int]:
    """Registers and stack bytes a thread; the kernels put nothing on the stack but what they spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(rf"Function {compiled.metadata.name}:\s+REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected the resource usage of {compiled.metadata.name}, got {usage!r}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    print_report(compile_kernels())
