"""DistributedDataParallel(meta) on two gloo processes against one process."""

from __future__ import annotations

import datetime
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from plain_loop import distance
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import metafast
from metafast.inner import SGD

SECONDS = 60.0
RULE = SGD(lr=0.1, learn={"lr": "tensor"})
LEARNERS = {
    "kept": lambda net, reduction: metafast.MAML(net, loss_fn, inner=RULE, steps=2, reduction=reduction),
    "checkpointed": lambda net, reduction: metafast.MAML(
        net, loss_fn, inner=RULE, steps=2, checkpoint=True, reduction=reduction
    ),
    "chunks": lambda net, reduction: metafast.MAML(
        net, loss_fn, inner=RULE, steps=2, tasks_per_chunk=2, reduction=reduction
    ),
    "anil": lambda net, reduction: metafast.ANIL(
        net, loss_fn, head="2.*", inner=RULE, steps=2, reduction=reduction, on_nonfinite="skip"
    ),
    "reptile": lambda net, reduction: metafast.Reptile(net, loss_fn, inner=SGD(lr=0.1), steps=2, reduction=reduction),
}


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def problem(tasks=5):
    """The same on every process."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    batches = [
        tuple(torch.randn(tasks, shots, n, generator=generator, dtype=torch.float64) for n in (3, 1))
        for shots in (4, 6)
    ]
    return net, batches


def part(batches, tasks):
    return [tuple(x[tasks] for x in batch) for batch in batches]


def process(rank, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    try:
        found = function(rank, *arguments)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_two_processes(folder, function, *arguments):
    """What the function returns on each rank, or its error as text; fails where one hangs."""
    context = mp.spawn(process, (folder, function, arguments), nprocs=2, join=False)
    deadline = time.monotonic() + SECONDS
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for running in context.processes:
                running.kill()
            pytest.fail(f"a rank still ran after {SECONDS} seconds")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


CASES = [
    ("kept", "mean", (slice(0, 2), slice(2, 4)), slice(0, 4)),
    ("kept", "global_mean", (slice(0, 4), slice(4, 5)), slice(0, 5)),
    ("checkpointed", "global_mean", (slice(0, 2), slice(2, 5)), slice(0, 5)),
    ("chunks", "global_mean", (slice(0, 2), slice(2, 5)), slice(0, 5)),
    ("anil", "global_mean", (slice(0, 3), slice(3, 5)), slice(0, 5)),
    ("reptile", "global_mean", (slice(0, 3), slice(3, 5)), slice(0, 5)),
]


def gradients_of_a_rank(rank):
    found = []
    for kind, reduction, split, _ in CASES:
        net, batches = problem()
        meta = DistributedDataParallel(LEARNERS[kind](net, reduction))
        mine = part(batches, split[rank])
        for _ in range(2):  # a second step: nothing is left over from the first
            meta.zero_grad()
            meta(*mine).backward()
        found.append([p.grad for p in meta.parameters()])
    return found


def expected_gradients(kind, tasks):
    net, batches = problem()
    meta = LEARNERS[kind](net, "mean")
    meta(*part(batches, tasks)).backward()
    return [p.grad for p in meta.parameters()]


def test_the_gradient_is_that_of_one_process(tmp_path):
    """Even and uneven numbers of tasks; processes take seconds to start, so all cases share two."""
    ranks = on_two_processes(tmp_path, gradients_of_a_rank)
    for found in ranks:
        assert not isinstance(found, str), found
        for (kind, _, _, tasks), grads in zip(CASES, found, strict=True):
            assert distance(grads, expected_gradients(kind, tasks)) < 1e-12, kind


def a_rank_with_a_bad_task(rank, skip):
    net, batches = problem()
    support, query = part(batches, slice(0, 3) if rank == 0 else slice(3, 5))
    if rank == 1:
        support[0][1] = torch.nan
    meta = DistributedDataParallel(LEARNERS["anil" if skip else "kept"](net, "global_mean"))
    meta(support, query).backward()
    return [p.grad for p in meta.parameters()]


def test_no_rank_waits_for_one_that_failed(tmp_path):
    started = time.monotonic()
    waiting, failed = on_two_processes(tmp_path, a_rank_with_a_bad_task, False)
    assert failed.startswith(
        "FloatingPointError: support loss: expected finite values, got nan in task 1 at inner step 0"
    )
    assert waiting == "RuntimeError: another rank failed before the meta-gradient; its own error says why"
    assert time.monotonic() - started < SECONDS / 2  # not by running into the process group's timeout


def test_a_skipped_task_is_no_part_of_the_mean_over_ranks(tmp_path):
    expected = expected_gradients("anil", slice(0, 4))
    for found in on_two_processes(tmp_path, a_rank_with_a_bad_task, True):
        assert not isinstance(found, str), found
        assert distance(found, expected) < 1e-12
