"""How a benchmark is taken: equal to the reference first, then timed beside its peers in interleaved rounds."""

from __future__ import annotations

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
SECONDS, FEWEST, MOST = 0.5, 3, 50


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

    All have run before, to be compared. The ratios are those of medians; pytest-benchmark's own statistics come from the
    same rounds. ``bars`` names peers; ``fastest`` is the bar against whichever peer turns out to be the fastest. ``moved``
    is how many bytes ``call`` reads and writes, each once. Returns the medians.
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
        calls = {"": call, **peers}
        # A round like the others, that says how many to take.
        seconds = {name: [seconds_of(each, DEVICE)] for name, each in calls.items()}
        one_round = sum(first for (first,) in seconds.values())

        def time_peers() -> None:
            for name, peer in peers.items():
                seconds[name].append(seconds_of(peer, DEVICE))

        benchmark.pedantic(
            lambda: seconds[""].append(seconds_of(call, DEVICE)),
            setup=time_peers,
            rounds=(rounds or min(MOST, max(FEWEST, int(SECONDS / one_round)))) - 1,
        )
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name in peers:
            compare("time", name, medians[""], medians[name], (bars or {}).get(name))
        if fastest is not None:
            best = min(peers, key=lambda name: medians[name])
            compare("time", f"fastest: {best}", medians[""], medians[best], fastest)
        if moved:
            benchmark.extra_info["gigabytes_per_second"] = moved / medians[""] / 1e9
        benchmark.extra_info["what"] = what
        benchmark.extra_info["peak_bytes"] = peak_memory(call, DEVICE)
        return medians

    return run
