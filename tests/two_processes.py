"""Two gloo processes, each a rank."""

from __future__ import annotations

import datetime
import gc
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60.0
METHOD = "forkserver"


def _process(rank, folder, function, arguments, seconds):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=seconds / 2),
    )
    try:
        found = function(rank, *arguments)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    torch.save(found, folder / f"{rank}.pt")
    # Sharded modules are in cycles of references, and have to be gone before their process group is.
    gc.collect()
    dist.destroy_process_group()


def on_two_processes(folder, function, *arguments, seconds=SECONDS):
    """What the function returns on each rank, or its error as text; fails where one hangs."""
    # Ranks are forked from a process that has imported all this once.
    mp.get_context(METHOD).set_forkserver_preload(["torch.distributed.fsdp", "metafast"])
    arguments = (folder, function, arguments, seconds)
    context = mp.start_processes(_process, arguments, nprocs=2, join=False, start_method=METHOD)
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for running in context.processes:
                running.kill()
            pytest.fail(f"a rank still ran after {seconds} seconds")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def part(batches, tasks):
    """Some tasks of support and query."""
    return [tuple(x[tasks] for x in batch) for batch in batches]
