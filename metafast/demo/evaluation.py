"""Accuracy on episodes of languages that were not in the training."""

from __future__ import annotations

from torch import nn

from metafast import inner
from metafast.algorithms import MAML
from metafast.demo.config import Config
from metafast.demo.data import Names, few_shot
from metafast.training import Interval, classification_loss, evaluate

STEPS = (0, 1, 3, 10)


def accuracy_after(
    model: nn.Module, learning_rates: dict[int, float], config: Config, names: Names, episodes: int, seed: int
) -> dict[int, Interval]:
    """Accuracy after several numbers of inner steps, each with its learning rate. A seed always gives the same episodes.

    Args:
        model: a classifier of ``config.ways`` classes.
        learning_rates: from the number of steps to the inner learning rate.
        config: settings of the run.
        names: texts by label, from which episodes are drawn.
        episodes: how many are drawn.
        seed: seed of the draw.
    """
    tasks = few_shot(config, names, seed)
    found: dict[int, Interval] = {}
    for lr in set(learning_rates.values()):
        meta = MAML(model, classification_loss, inner=inner.SGD(lr=lr))
        chosen = [steps for steps, of_steps in learning_rates.items() if of_steps == lr]
        result = evaluate(meta, tasks, episodes, steps=chosen)
        found |= {steps: result.interval("accuracy", steps) for steps in chosen}
    return {steps: found[steps] for steps in learning_rates}
