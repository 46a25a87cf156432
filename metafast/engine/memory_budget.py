"""The memory that graphs may take: a budget, of the memory that is free."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Of the memory that is free, for graphs: the backward pass and other users need some.
SHARE = 0.5


def check_budget(budget: int | float | None) -> int | float | None:
    """Raises TypeError or ValueError where ``budget`` is neither bytes nor a fraction of the free memory nor None."""
    if budget is None:
        return None
    expected = "memory_budget: expected bytes as an int, a fraction of the free memory as a float of at most 1, or None"
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"{expected}, got {type(budget).__name__}")
    if not (0 < budget <= 1 if isinstance(budget, float) else budget >= 1):
        raise ValueError(f"{expected}, got {budget!r}")
    return budget


def budget_bytes(budget: int | float | None, device: torch.device) -> int | None:
    """The budget in bytes; None where it is a fraction and the free memory is unknown."""
    if isinstance(budget, int):
        return budget
    free = free_bytes(device)
    return None if free is None else int((SHARE if budget is None else budget) * free)


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
