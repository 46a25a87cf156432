"""The command lines of ``train`` and ``evaluate``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from metafast.backend import BackendUnavailableError
from metafast.demo.config import ALGORITHMS, Config
from metafast.demo.files import Folder

_DEFAULTS = Config(iterations=200, queries=5, tasks=4, max_length=48, outer_lr=2e-3, backend="auto")
_HELP = {
    "ways": "classes per task",
    "shots": "texts per class to learn from",
    "queries": "texts per class to ask about",
    "steps": "inner steps in training",
    "tasks": "tasks per meta-step",
    "iterations": "meta-steps",
    "max_length": "bytes of a text that are kept",
    "width": "width of the Transformer",
    "layers": "layers of the Transformer",
    "seed": "seed of the split, the initial parameters and the episodes",
}


def add_train(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``train``."""
    _add_file(parser)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default=_DEFAULTS.algorithm)
    for name, text in _HELP.items():
        default = getattr(_DEFAULTS, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    for name in ("inner_lr", "outer_lr"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(_DEFAULTS, name))
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.set_defaults(run=_train)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``evaluate``."""
    _add_file(parser)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/train"), help="folder of a run (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 3, 10], help="inner steps (default: 0 3 10)")
    parser.add_argument("--episodes", type=int, default=600, help="test tasks (default: %(default)s)")
    parser.set_defaults(run=_evaluate)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="labelled texts: CSV, TSV, JSON or JSON lines")
    parser.add_argument("--text", default="text", help="name of the column of texts (default: %(default)s)")
    parser.add_argument("--label", default="label", help="name of the column of labels (default: %(default)s)")


def _train(options: argparse.Namespace) -> int:
    from metafast.backend import use_backend
    from metafast.commands.own_tasks import train

    chosen = vars(options)
    folder = Folder(options.out)
    names = {field.name for field in fields(Config)}
    try:
        config = Config(**{**_DEFAULTS.to_json(), **{name: chosen[name] for name in names & set(chosen)}})
        with use_backend(config.backend):
            found = train(options.file, config, folder, text=options.text, label=options.label, resume=options.resume)
    except (ValueError, OSError, ImportError, FloatingPointError, BackendUnavailableError) as error:
        print(f"metafast train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with the same options and --resume ({folder.path})", file=sys.stderr)
        return 130
    print(f"best accuracy on classes for validation: {found.best:.3f}, after {found.best_iteration} meta-steps")
    print(f"written to {folder.path}: {folder.checkpoint.name}, {folder.log.name}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from metafast.commands.own_tasks import evaluate_on_test

    names = {"text": options.text, "label": options.label}
    try:
        found = evaluate_on_test(options.file, Folder(options.checkpoint), options.steps, options.episodes, **names)
    except (ValueError, OSError, ImportError) as error:
        print(f"metafast evaluate: {error}", file=sys.stderr)
        return 1
    print(f"accuracy on {options.episodes} tasks of classes that no training saw, mean ± 95 % interval")
    for steps in sorted(set(options.steps)):
        print(f"after {steps:>2} steps: {found.interval('accuracy', steps)}")
    return 0
