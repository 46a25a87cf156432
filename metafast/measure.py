"""Time and peak memory of a call, as the check and the benchmarks take them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Median seconds of each call, in rounds that run every call once: what disturbs the machine disturbs them all."""
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that tensors made during ``call`` took at once.

    On CUDA the allocator counts; on the CPU the profiler's record of every allocation and release is added up.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    allocations = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for _, size in sorted(allocations, key=lambda allocation: allocation[0]):
        now += size
        peak = max(peak, now)
    return peak


def _nothing() -> None:
    pass
