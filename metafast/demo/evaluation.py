"""Accuracy on episodes of languages that were not in the training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from metafast import inner
from metafast.algorithms import MAML
from metafast.demo.config import Config, loss_fn
from metafast.tasks.text import LabelledText

STEPS = (0, 1, 3, 10)
# Episodes adapted side by side.
CHUNK = 20


@dataclass(frozen=True)
class Accuracy:
    """Mean over episodes, and half of the 95 % interval of that mean (normal approximation)."""

    mean: float
    half_width: float
    episodes: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


def accuracy_after(
    model: nn.Module,
    learning_rates: dict[int, float],
    config: Config,
    names: LabelledText,
    episodes: int,
    seed: int,
) -> dict[int, Accuracy]:
    """Accuracy after several numbers of inner steps, each with its learning rate. A seed always gives the same episodes.

    Args:
        model: a classifier of ``config.ways`` classes.
        learning_rates: from the number of steps to the inner learning rate.
        config: settings of the run.
        names: texts by label, from which episodes are drawn.
        episodes: how many are drawn.
        seed: seed of the draw.
    """
    found: dict[int, list[torch.Tensor]] = {steps: [] for steps in learning_rates}
    learners = {lr: MAML(model, loss_fn, inner=inner.SGD(lr=lr)) for lr in set(learning_rates.values())}
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, episodes, CHUNK):
        tasks = min(CHUNK, episodes - first)
        support, query = names.sample(tasks, config.ways, config.shots, config.queries, generator)
        for steps, lr in learning_rates.items():
            with torch.no_grad():
                logits = learners[lr].adapt(support, steps=steps)(query["text"])
            found[steps].append((logits.argmax(-1) == query["label"]).double().mean(1))
    return {steps: _summary(torch.cat(values)) for steps, values in found.items()}


def _summary(values: torch.Tensor) -> Accuracy:
    spread = values.std().item() if len(values) > 1 else math.nan
    return Accuracy(values.mean().item(), 1.96 * spread / math.sqrt(len(values)), len(values))
