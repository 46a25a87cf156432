"""How a benchmark is taken: equal to the reference first, then timed beside its baseline in interleaved rounds."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch

import metafast
from metafast.measure import interleaved_medians, peak_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["metafast"] = {
        **metafast.build_info(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine(),
    }


@pytest.fixture
def measure(benchmark) -> Callable[..., None]:
    """``measure(what, call, baseline=None, against=None, rounds=9, moved=0)``.

    pytest-benchmark's own statistics are those of ``call`` alone. The ratio that is claimed comes from rounds that run
    ``call`` and ``against`` in turn; ``baseline`` names the latter. ``moved`` is how many bytes ``call`` reads and
    writes, each once.
    """

    def run(
        what: str,
        call: Callable[[], object],
        baseline: str = "",
        against: Callable | None = None,
        rounds: int = 9,
        moved: int = 0,
    ):
        calls = {"call": call} if against is None else {"call": call, "against": against}
        medians = interleaved_medians(calls, rounds, DEVICE)
        if moved:
            benchmark.extra_info["gigabytes_per_second"] = moved / medians["call"] / 1e9
        if against is not None:
            benchmark.extra_info["speedup"] = medians["against"] / medians["call"]
            benchmark.extra_info["baseline"] = baseline
        benchmark.extra_info["what"] = what
        benchmark.extra_info["environment"] = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            "gemm": (metafast.build_info()["extension"] or {}).get("gemm"),
        }
        benchmark.extra_info["peak_bytes"] = peak_memory(call, DEVICE)
        if DEVICE == "cuda":
            benchmark.pedantic(lambda: (call(), torch.cuda.synchronize()), rounds=rounds, warmup_rounds=1)
        else:
            benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)

    return run
