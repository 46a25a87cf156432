"""Meta-training of the demo."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from metafast.demo.config import Config
from metafast.demo.data import Languages, LanguageTasks
from metafast.demo.files import Folder
from metafast.training import Fit, fit

SAVE_EVERY = 25
# Of the meta-gradient's norm: single episodes have gradients many times the usual.
MAX_NORM = 1.0


@dataclass(frozen=True)
class Trained:
    """A meta-trained network, and what its training came to."""

    model: nn.Module
    result: Fit


def train(
    config: Config, languages: Languages, folder: Folder, *, resume: bool = False, quiet: bool = False
) -> Trained:
    """Meta-trains to the last iteration, from the start or from the folder's checkpoint.

    Raises:
        ValueError, KeyboardInterrupt: see :func:`metafast.training.fit`.
    """
    model = config.model()
    optimizer = torch.optim.Adam(model.parameters(), config.outer_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda iteration: 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))
    )
    result = fit(
        config.learner(model),
        LanguageTasks(config, languages),
        optimizer,
        iterations=config.iterations,
        tasks_per_step=config.tasks,
        scheduler=schedule,
        clip_norm=MAX_NORM,
        folder=folder.path,
        resume=resume,
        save_every=SAVE_EVERY,
        settings={"config": config.to_json()},
        progress=not quiet,
    )
    return Trained(model, result)
