"""Time and peak memory of a call, as the check and the benchmarks take them."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig


def seconds_of(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, until the device has done its work."""
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Median seconds of each call, in rounds that run every call once: a disturbed machine disturbs all calls alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def highest_memory(device: torch.device | str = "cpu") -> int:
    """The most bytes that this process has held so far: resident ones, or on CUDA the allocator's.

    Memory that was freed before still counts, so that this is of use in a process that does one thing only.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not what getrusage says: on Linux a new process inherits that from the one that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that tensors made during ``call`` took at once.

    On CUDA the allocator counts; on the CPU the record of every allocation and release is added up.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Not torch.profiler, whose library writes a line to stderr at each start and stop. Torch would also warn of what is
    # released during the call, but was made before: garbage is collected first.
    gc.collect()
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))
    try:
        call()
    finally:
        threads = _disable_profiler_legacy()
    now = peak = 0
    for event in (event for thread in threads for event in thread):
        now += event.cpu_memory_usage()
        peak = max(peak, now)
    return peak
