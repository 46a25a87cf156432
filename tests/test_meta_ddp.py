"""DistributedDataParallel(meta) on two gloo processes against one process."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from plain_loop import distance
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import SECONDS, on_two_processes, part

import metafast
from metafast.inner import SGD

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
