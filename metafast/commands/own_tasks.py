"""Meta-training and evaluation on a file of labelled texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from metafast.demo.config import Config
from metafast.demo.data import few_shot
from metafast.demo.files import Folder, load_model, read_settings
from metafast.tasks import Examples, Split, read_examples, split
from metafast.training import Evaluation, Fit, Validation, evaluate, fit

# Of the classes; at least as many as an episode has.
HELD_OUT = 0.2
# Validation and test draw other episodes than training.
VALIDATION_SEED, TEST_SEED = 1_000_003, 1_000_001
MAX_NORM = 1.0
# Validations in all, and tasks of each.
CHECKS, CHECK_EPISODES = 10, 40
# Meta-steps from which recording pays.
RECORDED = 50


def held_out(examples: Examples, config: Config) -> Split:
    """Classes for training, validation and test: a fifth for each of the last two, and at least the ways of an episode.

    Raises:
        ValueError: there are too few classes, or a text is on both sides.
    """
    count = max(config.ways, round(HELD_OUT * len(examples)))
    if len(examples) < 2 * count + config.ways:
        raise ValueError(
            f"tasks: expected at least {2 * count + config.ways} classes, {config.ways} ways for each of training, "
            f"validation and test, got {len(examples)}; add classes or lower --ways"
        )
    share = count / len(examples)
    return split(examples, validation=share, test=share, seed=config.seed)


def train(
    file: Path,
    config: Config,
    folder: Folder,
    *,
    text: str = "text",
    label: str = "label",
    resume: bool = False,
) -> Fit:
    """Meta-trains a classifier of bytes on the classes of a file, of which some validate and some are kept for testing.

    Args:
        file: whatever :func:`metafast.tasks.read_examples` reads.
        config: settings.
        folder: where the checkpoint and the log are written.
        text, label: names of the file's columns.
        resume: whether to go on from the folder's checkpoint.

    Raises:
        ValueError, OSError, KeyboardInterrupt: see :func:`metafast.training.fit` and :func:`held_out`.
    """
    parts = held_out(read_examples(file, text=text, label=label), config)
    training = few_shot(config, parts.training, config.seed)
    validation = few_shot(config, parts.validation, VALIDATION_SEED)
    few_shot(config, parts.test, TEST_SEED)  # which finds now what an evaluation would find later
    model = config.model()
    optimizer = torch.optim.Adam(model.parameters(), config.outer_lr)
    settings: dict[str, Any] = {"config": config.to_json(), "test": list(parts.test)}
    meta = config.learner(model)
    # All texts have one length. Recording a step takes as long as some steps.
    meta.capture = config.iterations >= RECORDED
    return fit(
        meta,
        training,
        optimizer,
        iterations=config.iterations,
        tasks_per_step=config.tasks,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations),
        clip_norm=MAX_NORM,
        validation=Validation(
            validation, every=max(1, config.iterations // CHECKS), episodes=CHECK_EPISODES, monitor="accuracy"
        ),
        folder=folder.path,
        resume=resume,
        settings=settings,
        progress=sys.stderr.isatty(),
    )


def evaluate_on_test(
    file: Path, folder: Folder, steps: list[int], episodes: int, *, text: str = "text", label: str = "label"
) -> Evaluation:
    """Accuracy of a checkpoint on tasks of the classes that its training kept for testing.

    Raises:
        ValueError: the folder has no checkpoint of :func:`train`, or the file lacks its classes.
    """
    config, _ = read_settings(folder)
    labels = folder.settings().get("test")
    if labels is None:
        raise ValueError(f"checkpoint: expected one of metafast train in {folder.path}, got one without test classes")
    model = config.model()
    load_model(folder, model)
    test = few_shot(config, read_examples(file, text=text, label=label).select(labels, "classes"), TEST_SEED)
    return evaluate(config.learner(model), test, episodes, steps=steps)
