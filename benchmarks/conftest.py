"""How a benchmark is taken: equal to the reference first, then timed beside its peers in interleaved rounds."""

from __future__ import annotations

import gc
import platform
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import metafast
from metafast.measure import peak_memory, seconds_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Where a benchmark names no number of rounds, it gets about this long, within these limits.
SECONDS, FEWEST, MOST = 0.5, 5, 50


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile", action="store_true", help="also time peers that torch.compile has to build first")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def compiling(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--compile"))


@pytest.fixture(autouse=True)
def described(benchmark, request: pytest.FixtureRequest) -> None:
    """What every entry of the result file carries, also one that does not come from ``measure``."""
    benchmark.extra_info["suite"] = request.module.__name__.rpartition("test_")[2]
    benchmark.extra_info["environment"] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["metafast"] = {
        **metafast.build_info(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine(),
    }


def comparison(of: str, peer: str, own: float, other: float, bar: float | None = None) -> dict[str, Any]:
    """A line of the table: ``own`` and the peer's ``other``, both costs, so that the ratio is how much better we are.

    Bars are lower limits of the ratio.
    """
    return {"of": of, "with": peer, "own": own, "other": other, "ratio": other / own, "bar": bar}


@pytest.fixture
def compare(benchmark) -> Callable[..., None]:
    """``compare(of, peer, own, other, bar=None)`` adds a line to the table."""

    def add(*arguments: Any, **options: Any) -> None:
        benchmark.extra_info.setdefault("comparisons", []).append(comparison(*arguments, **options))

    return add


@pytest.fixture
def measure(benchmark, compare) -> Callable[..., dict[str, float]]:
    """``measure(what, call, peers, bars, fastest=None, rounds=None, moved=0)`` times ``call`` and each of ``peers`` in turn.

    All have run before, to be compared. The ratios are those of medians of rounds that run the two in turn; the statistics
    of pytest-benchmark come from all rounds. ``bars`` names peers; ``fastest`` is the bar against whichever peer turns out
    to be the fastest. ``moved`` is how many bytes ``call`` reads and writes, each once. Returns the medians.
    """

    def run(
        what: str,
        call: Callable[[], object],
        peers: Mapping[str, Callable[[], object]],
        bars: Mapping[str, float] | None = None,
        fastest: float | None = None,
        rounds: int | None = None,
        moved: int = 0,
    ) -> dict[str, float]:
        # What pytest and the peers imported is left out of garbage collections, which take the longer the more there is.
        gc.collect()
        gc.freeze()
        # One peer after the other, each in rounds of its own beside ``call``: what a third one leaves behind, in caches and
        # in the allocator, is no part of a comparison of two. The first round says how many to take.
        own: dict[str, list[float]] = {name: [] for name in peers or ("",)}
        others: dict[str, list[float]] = {name: [seconds_of(peer, DEVICE)] for name, peer in peers.items()}
        one_round = seconds_of(call, DEVICE) + sum(first for (first,) in others.values())
        each = max(2, rounds or min(MOST, max(FEWEST, int(SECONDS / one_round))))
        turns = iter([name for name in own for _ in range(each)])
        now = ""

        def time_peer() -> None:
            nonlocal now
            now = next(turns)
            if now in peers:
                others[now].append(seconds_of(peers[now], DEVICE))

        benchmark.pedantic(lambda: own[now].append(seconds_of(call, DEVICE)), setup=time_peer, rounds=each * len(own))
        medians = {name: statistics.median(values[1:]) for name, values in others.items()}
        beside = {name: statistics.median(values) for name, values in own.items()}
        for name in peers:
            compare("time", name, beside[name], medians[name], (bars or {}).get(name))
        if fastest is not None:
            best = min(peers, key=lambda name: medians[name] / beside[name])
            compare("time", f"fastest: {best}", beside[best], medians[best], fastest)
        medians[""] = statistics.median([value for values in own.values() for value in values])
        if moved:
            benchmark.extra_info["gigabytes_per_second"] = moved / medians[""] / 1e9
        benchmark.extra_info["what"] = what
        if DEVICE == "cuda":
            # On the CPU it takes torch's profiler, after which everything with Python in it runs slower in this process.
            benchmark.extra_info["peak_bytes"] = peak_memory(call, DEVICE)
        return medians

    return run
