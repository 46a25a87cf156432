"""Meta-training and evaluation on a file of labelled texts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metafast.commands.network import EPOCHS, Network
from metafast.commands.settings import Settings
from metafast.commands.trained import read_run
from metafast.demo.files import Folder
from metafast.tasks import Examples, Split, read_examples, split
from metafast.training import Evaluation, Fit, Validation, evaluate, fit

# Of the classes; at least as many as an episode has.
HELD_OUT = 0.2
# Validation and test draw other episodes than training.
VALIDATION_SEED, TEST_SEED = 1_000_003, 1_000_001
MAX_NORM = 1.0
# Meta-steps from which recording pays.
RECORDED = 50


@dataclass(frozen=True)
class Effort:
    """Validations in all, tasks of each, and test tasks."""

    validations: int
    tasks: int
    test: int


OF_BYTES, OF_PRETRAINED = Effort(10, 40, 600), Effort(3, 20, 100)


def held_out(examples: Examples, settings: Settings) -> Split:
    """Classes for training, validation and test: a fifth for each of the last two, and at least the ways of an episode.

    Raises:
        ValueError: there are too few classes, or a text is on both sides.
    """
    count = max(settings.ways, round(HELD_OUT * len(examples)))
    if len(examples) < 2 * count + settings.ways:
        raise ValueError(
            f"tasks: expected at least {2 * count + settings.ways} classes, {settings.ways} ways for each of training, "
            f"validation and test, got {len(examples)}; add classes or lower --ways"
        )
    share = count / len(examples)
    return split(examples, validation=share, test=share, seed=settings.seed)


def train(file: Path, settings: Settings, folder: Folder, *, resume: bool = False) -> Fit:
    """Meta-trains a classifier on the classes of a file, of which some validate and some are kept for testing.

    Args:
        file: whatever :func:`metafast.tasks.read_examples` reads.
        settings: of the training.
        folder: where the checkpoint and the log are written.
        resume: whether to go on from the folder's checkpoint.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError, KeyboardInterrupt: see :func:`metafast.training.fit` and
            :func:`held_out`.
    """
    check_folder(folder, resume)
    parts = held_out(read_examples(file, text=settings.text, label=settings.label), settings)
    network = Network.new(settings)
    training = network.tasks(parts.training, settings.seed)
    validation = network.tasks(parts.validation, VALIDATION_SEED)
    network.tasks(parts.test, TEST_SEED)  # which finds now what an evaluation would find later
    meta = network.learner(settings.ways)
    meta.capture = not settings.pretrained and settings.iterations >= RECORDED and meta.steps > 0
    optimizer = torch.optim.Adam([p for p in meta.parameters() if p.requires_grad], settings.outer_lr)
    folder.check_writable()
    network.save(folder.path)
    effort = effort_of(settings)
    stored: dict[str, Any] = {"train": settings.to_json(), "test": list(parts.test)}
    return fit(
        meta,
        training,
        optimizer,
        iterations=settings.iterations,
        tasks_per_step=settings.tasks,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations),
        clip_norm=MAX_NORM,
        validation=Validation(
            validation,
            every=max(1, settings.iterations // effort.validations),
            episodes=effort.tasks,
            monitor="accuracy",
        ),
        epoch_length=max(1, settings.iterations // EPOCHS),
        folder=folder.path,
        resume=resume,
        settings=stored,
        progress=sys.stderr.isatty(),
    )


def check_folder(folder: Folder, resume: bool) -> None:
    """Raises ValueError where there is nothing to resume in the folder, or an earlier training that is not resumed."""
    if resume:
        folder.expect_checkpoint()
    elif folder.checkpoint.exists():
        raise ValueError(
            f"out: expected a folder without a training, got one in {folder.path}; --resume goes on with it, another --out "
            "begins anew"
        )


def effort_of(settings: Settings) -> Effort:
    """What validation and test take."""
    return OF_PRETRAINED if settings.pretrained else OF_BYTES


@dataclass(frozen=True)
class Tested:
    """Accuracies on test tasks, and how many tasks."""

    evaluation: Evaluation
    episodes: int


def evaluate_on_test(
    file: Path,
    folder: Folder,
    steps: list[int] | None = None,
    episodes: int | None = None,
    *,
    text: str | None = None,
    label: str | None = None,
) -> Tested:
    """Accuracy of a checkpoint on tasks of the classes that its training kept for testing.

    Args:
        file: the file of the training.
        folder: of the training.
        steps: numbers of inner steps; None: 0 and as many as in training.
        episodes: test tasks; None: as :func:`effort_of` says.
        text, label: names of the file's columns; None: those of the training.

    Raises:
        ValueError: the folder has no checkpoint of :func:`train`, or the file lacks its classes.
    """
    run = read_run(folder)
    settings = run.settings
    examples = read_examples(file, text=text or settings.text, label=label or settings.label)
    network = Network.saved(settings, folder.path)
    test = network.tasks(examples.select(run.test, "classes"), TEST_SEED)
    episodes = effort_of(settings).test if episodes is None else episodes
    return Tested(evaluate(network.learner(settings.ways), test, episodes, steps=steps), episodes)
