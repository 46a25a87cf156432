"""The memory that graphs take, and the memory that is free: how ``"auto"`` decides on memory."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("metafast")
# Of the memory that is free, for kept graphs: the backward pass and other users need some.
SHARE = 0.5
# From here on the graph of one step of one task consists of tensors that are large enough for a device by themselves: more
# tasks side by side take more memory, and no less time.
LARGE_GRAPH = {"cpu": 64 * 2**20, "cuda": 2**30}


def graphs_fit(step: Callable[[], object], steps: int, device: torch.device) -> bool:
    """Whether the graphs of ``steps`` steps fit into half of the free memory. Logs the numbers.

    Args:
        step: computes one step and returns its graph.
        steps: number of steps of the inner loop.
        device: the device whose memory counts.
    """
    needed = steps * graph_bytes(step)
    free = free_bytes(device)
    fit = free is None or needed <= SHARE * free
    logger.info(
        "checkpoint='auto': graphs of %d steps take about %.3g GiB, %s; they are %s",
        steps,
        needed / 2**30,
        "free memory is unknown" if free is None else f"{free / 2**30:.3g} GiB are free",
        "kept" if fit else "rebuilt in the backward pass",
    )
    return fit


def tasks_side_by_side(step_of_one: Callable[[], object], steps: int, tasks: int, device: torch.device) -> int:
    """How many of the tasks should run side by side. Logs the numbers.

    Args:
        step_of_one: computes one step of one task and returns its graph.
        steps: number of steps whose graphs are kept at a time.
        tasks: number of tasks.
        device: the device whose memory counts.
    """
    graph = graph_bytes(step_of_one)
    large = LARGE_GRAPH.get(device.type, LARGE_GRAPH["cuda"])
    free = free_bytes(device)
    fit = tasks if free is None else int(SHARE * free) // max(steps * graph, 1)
    number = max(1, min(tasks, fit, -(-large // max(graph, 1))))
    logger.info(
        "tasks_per_chunk='auto': the graph of a step takes about %.3g MiB per task, %s; %d of %d tasks run side by side",
        graph / 2**20,
        "free memory is unknown" if free is None else f"{free / 2**30:.3g} GiB are free",
        number,
        tasks,
    )
    return number


class _Saved:
    """Holds a tensor that autograd keeps; lives as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def graph_bytes(step: Callable[[], object]) -> int:
    """The bytes of the tensors that the graph of ``step()`` keeps, each storage once."""
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        kept = _Saved(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        graph = step()
    storages = [kept.tensor.untyped_storage() for kept in saved]
    del graph
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device; of the machine or, if that is less, of the process's container; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator holds and does not use is free as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [size for size in (_available(), _container()) if size is not None]
    return min(found) if found else None


def _available() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
        if "SC_AVPHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
