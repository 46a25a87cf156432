"""Every module of torch, between parameters, in a learner beside the plain loop.

CI takes some samples of each module, others at each run. METAFAST_FULL=1 takes all, and captures many of them.
"""

from __future__ import annotations

import random
import warnings

import pytest
import torch
import torch_database
from differential import DRAWS, TASKS, Findings, examine
from some_cases import FULL, half
from torch import nn
from torch_database import EXTRAS

import metafast
from metafast.inner import SGD

SAMPLES = 1
# Recording takes a second or two.
CAPTURED = 24 if FULL else 0
# In CI, of all modules.
CAPTURED_MODULES = [
    "nn.BatchNorm1d",
    "nn.InstanceNorm1d",
    "nn.Conv1d",
    "nn.CrossEntropyLoss",
    "nn.LayerNorm",
    "nn.MaxPool2d",
    "nn.Embedding",
]

REFUSED = {
    "nn.CTCLoss": "its lengths are looked at in Python",
    "nn.GaussianNLLLoss": "it looks whether a variance is negative",
    "AdaptiveLogSoftmaxWithLoss": "how many labels a cluster has decides on shapes",
    "CrossMapLRN2d": "it resizes tensors in place",
    **dict.fromkeys(
        ("Embedding of bounded norm", "Embedding of bounded norm, padded", "EmbeddingBag of bounded norm"),
        "its look-ups write to a parameter",
    ),
    "Embedding sparse, padded": "a sparse gradient's shape depends on the ids",
}
"""What may be refused under capture, and why."""


@pytest.fixture(autouse=True)
def _without_warnings():
    """Torch warns of what its samples do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def examined(cases, samples, captured):
    random.seed(torch.initial_seed())
    chosen = cases if samples is None else random.sample(cases, min(samples, len(cases)))
    recorded = {case.name for case in random.sample(chosen, min(captured, len(chosen)))}
    findings = Findings()
    for case in chosen:
        examine(case, findings, (random.choice((1, 2)),) if case.name in recorded else ())
    print(dict(findings.counts))
    return findings


def check(findings, name):
    assert not findings.wrong, "\n".join(findings.wrong)
    assert not findings.refused or name in REFUSED, findings.refused
    assert all("replay" in message for message in findings.refused.values())


@pytest.mark.parametrize("name", torch_database.names())
def test_the_database(name, generator):
    captured = CAPTURED or (name in CAPTURED_MODULES)
    check(examined(torch_database.database(name, DRAWS), None if FULL else SAMPLES, captured), name)


@pytest.mark.parametrize("name", half(EXTRAS))
def test_beside_the_database(name, generator):
    check(examined(torch_database.extras(name, DRAWS), None if FULL else SAMPLES, 2 if FULL else 0), name)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(
    ("dropout", "shape", "whole"),
    [
        (nn.Dropout(0.3), (2000,), ()),
        (nn.Dropout1d(0.3), (200, 10), (-1,)),
        (nn.Dropout2d(0.3), (2, 200, 3, 3), (-1, -2)),
        (nn.Dropout3d(0.3), (2, 200, 2, 2, 2), (-1, -2, -3)),
    ],
)
def test_every_task_has_a_dropout_mask_of_its_own(dropout, shape, whole, capture, generator):
    """The gradient by a factor before it is the mask; after a step of size 1 on its sum, the factor shows the mask."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
            self.dropout = dropout

        def forward(self, x):
            return self.dropout(self.factor * x)

    meta = metafast.MAML(
        Masked(), lambda model, x: model(x).sum(), inner=SGD(lr=1.0), steps=1, order=1, task_batching="vmap", capture=capture
    )  # fmt: skip
    draws = [-meta.adapt(torch.ones(TASKS, *shape, dtype=torch.float64)).params["factor"] for _ in range(2)]
    masks = [mask for draw in draws for mask in draw]
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, 1 / 0.7}
        channels = mask.amax(whole) if whole else mask
        if whole:
            assert torch.equal(channels, mask.amin(whole))
        # Six standard deviations.
        assert abs((channels == 0).double().mean() - 0.3) < 6 * (0.21 / channels.numel()) ** 0.5
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 2 * TASKS
