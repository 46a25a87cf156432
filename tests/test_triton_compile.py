"""The Triton kernels of attention compile for GPUs, without one, in a fresh process, since the interpreter must be off;
and how their configurations are chosen, with a clock that is made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metafast.ops.attention.triton import tiles
from metafast.ops.attention.triton.tiles import Config

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
        options, tangents = (torch.ones(1, 3, 1, 1, 50), None, None, Options(NO_LIMIT, 0, 0.0, 1.0)), (None, None)
    """,
    "one key, width 1, additive mask of rows, window": """
        query, key, value = torch.zeros(1, 9, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)
        mask = torch.zeros(1, 9, 1)
        options, tangents = (mask, None, None, Options(3, 2, 0.0, 1.0)), (mask, torch.zeros(1, 9, 1))
    """,
    "dropout, one number for a mask, window at an offset": """
        query = key = value = torch.zeros(2, 2, 200, 64, dtype=torch.float16)
        mask, seeds = torch.zeros(1, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
        options, tangents = (mask, seeds, None, Options(-30, 90, 0.7, 1.0)), (mask, query)
    """,
    "key ranges, additive mask of keys, causal": """
        query = key = value = torch.zeros(2, 2, 200, 64, dtype=torch.bfloat16)
        mask, ranges = torch.zeros(1, 1, 1, 200, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int64)
        options, tangents = (mask, None, ranges, Options(NO_LIMIT, 7, 0.0, 1.0)), (mask, query)
    """,
    "boolean mask, dropout": """
        query = key = value = torch.zeros(2, 2, 40, 32, dtype=torch.bfloat16)
        mask, seeds = torch.ones(2, 1, 40, 40, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
        options, tangents = (mask, seeds, None, Options(NO_LIMIT, NO_LIMIT, 0.1, 1.0)), (None, None)
    """,
}
COMPILE = """
import json, torch
from metafast.ops.attention.options import NO_LIMIT, Options
from metafast.ops.attention.triton import backward, backward_jvp, forward, mask_backward, mask_backward_jvp
from metafast.ops.attention.triton.compile import compiling_for

def compiled(query, key, value, options, tangents):
    with compiling_for(90) as kernels:
        out, statistics = forward(query, key, value, *options)
        saved = (out, query, key, value, out, statistics)
        directions = (query, key, value, *tangents)
        backward(*saved, *options)
        backward_jvp(*saved, *directions, *options)
        if options[0].is_floating_point():
            mask_backward(*saved, *options)
            mask_backward_jvp(*saved, *directions, *options)
    return [[kernel.metadata.name, kernel.metadata.shared] for kernel in kernels]

found = {}
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


def test_variants_compile() -> None:
    """In one process, since torch and Triton take seconds to start."""
    program = [COMPILE]
    for name, arguments in VARIANTS.items():
        program += [line.strip() for line in arguments.strip().splitlines()]
        program += [f"found[{name!r}] = compiled(query, key, value, options, tangents)"]
    found = output_of("\n".join([*program, "print(json.dumps(found))"]))
    assert list(found) == list(VARIANTS)
    without_mask_gradient = KERNELS[:6]
    for name, compiled in found.items():
        assert list(dict.fromkeys(kernel for kernel, _ in compiled)) in (KERNELS, without_mask_gradient), name
        assert all(0 < shared <= SHARED_MEMORY for _, shared in compiled), name


def test_the_interpreter_cannot_compile() -> None:
    program = "from metafast.ops.attention.triton.compile import compile_kernels; next(compile_kernels())"
    finished = run(program, TRITON_INTERPRET="1")
    assert finished.returncode == 1
    assert "RuntimeError: compile_kernels: expected TRITON_INTERPRET to be unset" in finished.stderr


KEY = tiles.Key("NVIDIA H200", "3.6.0", "jvp_kernel", "bfloat16", "ieee", 64, 64, 1024, 1024, "right")
TABLE = Config(64, 64, 4, 2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("METAFAST_AUTOTUNE", raising=False)
    return tmp_path / tiles.FILE_NAME


class Clock:
    """A measure under which a larger tile takes less time, and one of three stages does not start."""

    def __init__(self) -> None:
        self.measured: list[Config] = []

    def __call__(self, config: Config) -> float:
        self.measured.append(config)
        return float("inf") if config.num_stages == 3 else 1.0 / (config.query_block * config.key_block)


def chosen(clock: Clock, key: tiles.Key = KEY) -> Config:
    def candidates() -> list[Config]:
        return tiles.space(key.kernel, key.head_block, key.value_block, 2, SHARED_MEMORY, TABLE)

    return tiles.choose(TABLE, lambda: key, candidates, clock)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "delta_kernel"])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_space_begins_with_the_table_and_is_small(kernel: str, width: int, itemsize: int) -> None:
    default = tiles.table(kernel, width, itemsize, "ieee", (9, 0))
    found = tiles.space(kernel, width, width, itemsize, SHARED_MEMORY, default)
    assert found[0] == default
    assert len(set(found)) == len(found) <= 37


def test_a_space_leaves_out_what_cannot_fit() -> None:
    wide = tiles.space("backward_jvp_key_kernel", 128, 128, 2, SHARED_MEMORY, TABLE)[1:]
    assert wide
    for config in wide:
        assert 2 * 512 * (config.key_block + config.num_stages * config.query_block) <= SHARED_MEMORY
        assert config.key_block * 256 <= 160 * 32 * config.num_warps
    smaller = tiles.space("backward_jvp_key_kernel", 128, 128, 2, 99 * 1024, TABLE)[1:]
    assert set(smaller) < set(wide)


def test_nothing_is_measured_unless_asked(cache: Path) -> None:
    clock = Clock()
    assert chosen(clock) == TABLE
    assert clock.measured == []
    assert not cache.exists()


def test_the_fastest_is_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setenv("METAFAST_AUTOTUNE", "1")
    best = chosen(clock)
    assert clock(best) == min(map(clock, list(clock.measured))) < clock(TABLE)
    assert best.num_stages < 3
    assert json.loads(cache.read_text()) == {KEY.text(): list(best)}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    again = Clock()
    assert chosen(again) == best
    assert again.measured == []
    # A process that starts later finds the file; one that wants the table gets the table.
    monkeypatch.delenv("METAFAST_AUTOTUNE")
    monkeypatch.setattr(tiles, "_files", {})
    assert chosen(again) == best
    assert chosen(again, KEY._replace(gpu="NVIDIA A100")) == TABLE
    monkeypatch.setenv("METAFAST_AUTOTUNE", "0")
    assert chosen(again) == TABLE
    assert again.measured == []


def test_where_nothing_starts_the_table_stays() -> None:
    candidates = [TABLE, Config(32, 32, 4, 1)]
    assert tiles.fastest(candidates, lambda config: float("inf")) == TABLE


def test_writers_keep_what_others_wrote(cache: Path) -> None:
    first, second = tiles.Choices(cache), tiles.Choices(cache)
    assert not first
    assert not second
    other = KEY._replace(kernel="forward_kernel")
    first.put(KEY, TABLE)
    second.put(other, TABLE)
    assert tiles.Choices(cache).get(KEY) == tiles.Choices(cache).get(other) == TABLE


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": [64, 64, 4]}', '{"a": [64, 64, 4, "2"]}', '{"a": [64, 64, 0, 2]}']
)
def test_a_corrupt_file_is_ignored_with_a_warning(cache: Path, content: str) -> None:
    cache.write_text(content)
    unread = tiles.Choices(cache)
    with pytest.warns(UserWarning, match="ignored, the table decides instead"):
        assert unread.get(KEY) is None
    with pytest.warns(UserWarning, match="ignored"):
        unread.put(KEY, TABLE)
    assert tiles.Choices(cache).get(KEY) == TABLE


def test_an_unknown_mode_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFAST_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="METAFAST_AUTOTUNE: expected 0 or 1, got 'yes'"):
        chosen(Clock())


@pytest.mark.parametrize(("length", "expected"), [(1, 64), (64, 64), (65, 128), (1000, 1024), (10**6, 16384)])
def test_lengths_are_told_apart_by_powers_of_two(length: int, expected: int) -> None:
    assert tiles.bucket(length) == expected
