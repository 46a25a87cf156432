"""The options of ``train``, ``evaluate`` and ``adapt``, and what their help says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from metafast.commands.config_file import read_config
from metafast.commands.settings import ADAPTS, Settings, kinds

__all__ = [
    "DEMO",
    "TRAIN",
    "add_adapt_options",
    "add_evaluate_options",
    "add_train_options",
    "out_of",
    "settings_of",
]

TRAIN, DEMO = Path("runs/train"), Path("runs/demo")

_FILE = """\
The file has a text and the label of its class in each row. A CSV file begins with the names of its columns:

  text,label
  book me a table for two,restaurant
  "wake me at six, please",alarm

TSV, JSON and JSON lines are read as well. The file's name says which it is: .csv, .tsv, .json or .jsonl.
"""

_TRAIN = f"""\
Meta-trains a few-shot classifier on your own labelled texts.

{_FILE}
A fifth of the classes is held out for validation and a fifth for testing, and at least as many as --ways. The parameters
that are best on the validation classes are kept. The folder of the run then holds all that evaluate and adapt need.
Ctrl-C writes a checkpoint, and --resume goes on from it. --resume takes all settings from the checkpoint.
"""
_TRAIN_EXAMPLE = """\
example:
  python -m metafast train tasks.csv --model bytes --algorithm protonet --shots 3 --out runs/intents

A file of settings has the same names as the options, with underscores. Options on the command line win over it:
  model = "models/minilm"
  algorithm = "anil"
  inner_lr = 1.0
"""

_EVALUATE = f"""\
Measures a trained classifier on the classes that its training has held out for testing.

{_FILE}
It must be the file of the training. Many tasks are drawn from the test classes. The command prints the mean accuracy, and
half of its 95 % interval, before the inner steps and after them.
"""
_EVALUATE_EXAMPLE = """\
example:
  python -m metafast evaluate tasks.csv --checkpoint runs/train --steps 0 3 10
"""

_ADAPT = f"""\
Adapts a trained classifier to other classes, and predicts labels.

{_FILE}
Some texts of each class are learned from. The labels of the others are predicted, before and after adaptation. A folder of
train or of demo will do. With protonet and protomaml there may be any number of classes, otherwise at most as many as in
a task of the training.
"""
_ADAPT_EXAMPLE = """\
examples:
  python -m metafast adapt --checkpoint runs/train --file own.csv --predictions predictions.csv
  python -m metafast adapt --checkpoint runs/demo --languages ka,hy,eo,cy,br
"""

_HELP = {
    "model": "bytes, a small Transformer over bytes, or a Hugging Face model: its folder, or its name on the hub",
    "algorithm": ", ".join(ADAPTS),
    "adapt": "what inner steps change: head, or all layers that train",
    "ways": "classes per task",
    "shots": "texts per class to learn from",
    "queries": "texts per class to ask about",
    "steps": "inner steps in training",
    "tasks": "tasks per meta-step",
    "iterations": "meta-steps",
    "inner_lr": "learning rate of the inner steps",
    "outer_lr": "learning rate of the meta-steps, at the start",
    "max_length": "bytes or tokens of a text that are kept",
    "width": "of bytes: width of the Transformer",
    "layers": "of bytes: layers of the Transformer",
    "heads": "of bytes: attention heads of a layer",
    "trained_layers": "of a Hugging Face model: the number of last layers that train",
    "seed": "seed of the split, the initial parameters and the episodes",
    "text": "name of the column of texts",
    "label": "name of the column of labels",
}


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``train``."""
    _describe(parser, _TRAIN, _TRAIN_EXAMPLE)
    parser.add_argument("file", type=Path, help="labelled texts: CSV, TSV, JSON or JSON lines")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of settings")
    over_bytes, pretrained = Settings.of({}), Settings.of({"model": "of Hugging Face"})
    for name, kind in kinds().items():
        default, other = getattr(over_bytes, name), getattr(pretrained, name)
        also = f"; {other} with a Hugging Face model" if other != default and name != "model" else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,
            metavar={int: "N", float: "X", str: "NAME"}[kind],
            help=f"{_HELP[name]} (default: {default}{also})",
        )
    parser.add_argument("--out", type=Path, default=argparse.SUPPRESS, help=f"folder of the run (default: {TRAIN})")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``evaluate``."""
    _describe(parser, _EVALUATE, _EVALUATE_EXAMPLE)
    parser.add_argument("file", type=Path, help="labelled texts: CSV, TSV, JSON or JSON lines")
    _add_columns(parser, as_in_training=True)
    parser.add_argument("--checkpoint", type=Path, default=TRAIN, help="folder of a run (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, nargs="+", metavar="N", help="inner steps (default: 0, and as many as in training)"
    )
    parser.add_argument(
        "--episodes", type=int, metavar="N", help="test tasks (default: 600; 100 with a Hugging Face model)"
    )


def add_adapt_options(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``adapt``."""
    _describe(parser, _ADAPT, _ADAPT_EXAMPLE)
    parser.add_argument(
        "--checkpoint", type=Path, help=f"folder of a run (default: {TRAIN}, or {DEMO} with --languages)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--file", type=Path, help="labelled texts: CSV, TSV, JSON or JSON lines")
    source.add_argument("--languages", help="codes with commas between, such as ka,hy,eo,cy,br")
    _add_columns(parser, as_in_training=False)
    parser.add_argument(
        "--shots", type=int, metavar="N", help="texts per label to learn from (default: as in training)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="inner steps (default: as in training)")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="a CSV file to write with every text, its label and predictions",
    )
    parser.add_argument(
        "--show", type=int, default=5, metavar="N", help="examples to print per label (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the draw of the texts to learn from (default: %(default)s)",
    )


def settings_of(options: argparse.Namespace, stored: Settings | None) -> Settings:
    """The settings of ``train``.

    Args:
        options: from the command line. They win over a file of settings, and this over ``stored`` and over defaults.
        stored: those of the training that is resumed; None: a new training.

    Raises:
        TypeError, ValueError, OSError: see :func:`metafast.commands.config_file.read_config` and
            :class:`metafast.commands.settings.Settings`.
    """
    flags = {name: value for name, value in vars(options).items() if name in kinds()}
    from_file = {name: value for name, value in _file_of(options).items() if name in kinds()}
    chosen = {**from_file, **flags}
    try:
        return Settings.of(chosen) if stored is None else Settings.from_json({**stored.to_json(), **chosen})
    except ValueError as error:
        name = str(error).partition(":")[0]
        if name in from_file and name not in flags:
            raise ValueError(f"{options.config}: {error}") from error
        raise


def out_of(options: argparse.Namespace) -> Path:
    """The folder of a run of ``train``, from the command line, a file of settings, or the default."""
    return Path(getattr(options, "out", None) or _file_of(options).get("out", TRAIN))


def _file_of(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.config is None else read_config(options.config)


def _describe(parser: argparse.ArgumentParser, description: str, example: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = description
    parser.epilog = example


def _add_columns(parser: argparse.ArgumentParser, *, as_in_training: bool) -> None:
    for name in ("text", "label"):
        default, said = (None, "as in training") if as_in_training else (name, name)
        parser.add_argument(f"--{name}", default=default, metavar="NAME", help=f"{_HELP[name]} (default: {said})")
