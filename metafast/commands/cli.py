"""The command lines of ``train``, ``evaluate`` and ``adapt``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable

from metafast.backend import BackendUnavailableError
from metafast.commands import options as of
from metafast.demo.files import Folder

ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, BackendUnavailableError)


def add_train(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``train``."""
    of.add_train_options(parser)
    parser.set_defaults(run=lambda options: _reported("train", _train, options))


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``evaluate``."""
    of.add_evaluate_options(parser)
    parser.set_defaults(run=lambda options: _reported("evaluate", _evaluate, options))


def add_adapt(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``adapt``."""
    of.add_adapt_options(parser)
    parser.set_defaults(run=lambda options: _reported("adapt", _adapt, options))


def _reported(command: str, run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Runs a command. An error takes one line."""
    try:
        return run(options)
    except ERRORS as error:
        print(f"metafast {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nmetafast {command}: interrupted", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    from metafast.commands.own_tasks import train
    from metafast.commands.trained import read_run
    from metafast.training.loop import check_settings

    folder = Folder(of.out_of(options))
    stored = None
    if options.resume:
        folder.expect_checkpoint()
        stored = read_run(folder).settings
    settings = of.settings_of(options, stored)
    if stored is not None:
        check_settings(folder.checkpoint, settings.to_json(), stored.to_json())
    try:
        found = train(options.file, settings, folder, resume=options.resume)
    except KeyboardInterrupt:
        if not folder.checkpoint.exists():
            raise
        again = shlex.join(
            ["python", "-m", "metafast", "train", str(options.file), "--out", str(folder.path), "--resume"]
        )
        print(f"\nmetafast train: interrupted; a checkpoint is written; go on with: {again}", file=sys.stderr)
        return 130
    print(f"best accuracy on classes for validation: {found.best:.3f}, after {found.best_iteration} meta-steps")
    print(f"written to {folder.path}: {folder.checkpoint.name}, {folder.log.name}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from metafast.commands.own_tasks import evaluate_on_test

    names = {"text": options.text, "label": options.label}
    found = evaluate_on_test(options.file, Folder(options.checkpoint), options.steps, options.episodes, **names)
    print(f"accuracy on {found.episodes} tasks of classes that no training saw, mean ± 95 % interval")
    for steps in found.evaluation.values["accuracy"]:
        print(f"after {steps:>2} steps: {found.evaluation.interval('accuracy', steps)}")
    return 0


def _adapt(options: argparse.Namespace) -> int:
    from metafast.commands.adapt import adapt, table, to_csv
    from metafast.tasks import cldr, read_examples
    from metafast.training.checkpoint import write

    if options.show < 0:
        raise ValueError(f"show: expected at least 0, got {options.show}")
    if options.file is not None:
        read = read_examples(options.file, text=options.text, label=options.label)
        texts = {label: list(of_label) for label, of_label in read.items()}
    else:
        chosen = cldr.select(options.languages.split(","), "languages")
        texts = {f"{cldr.english_name(code)} ({code})": list(names) for code, names in chosen.items()}
    checkpoint = options.checkpoint or (of.TRAIN if options.file is not None else of.DEMO)
    examples = adapt(Folder(checkpoint), texts, shots=options.shots, steps=options.steps, seed=options.seed)
    if options.predictions is not None:
        write(options.predictions, to_csv(examples).encode())
    print(table(examples, options.show))
    return 0
