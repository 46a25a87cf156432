"""The command lines of ``demo`` and ``adapt``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from metafast.backend import BACKENDS, BackendUnavailableError
from metafast.demo.config import ALGORITHMS, Config
from metafast.demo.files import Folder

_HELP = {
    "ways": "languages per episode",
    "shots": "names per language to learn from",
    "steps": "inner steps in training",
    "seed": "seed of the initial parameters and of the episodes",
    "iterations": "meta-steps",
}


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``demo``."""
    defaults = Config()
    parser.add_argument("--algorithm", choices=ALGORITHMS, default=defaults.algorithm)
    for name, text in _HELP.items():
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--backend", choices=BACKENDS, default=defaults.backend, help="backend of every op (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.set_defaults(run=_demo)


def add_adapt(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the options of ``adapt``."""
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/demo"), help="folder of a run (default: %(default)s)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--languages", help="codes with commas between, such as ka,hy,eo,cy,br")
    source.add_argument(
        "--file", type=Path, help="a file with the columns text and label: CSV, TSV, JSON or JSON lines"
    )
    parser.add_argument("--shots", type=int, help="texts per label to learn from (default: as in the checkpoint)")
    parser.add_argument("--steps", type=int, default=10, help="inner steps of the adaptation (default: %(default)s)")
    parser.add_argument(
        "--predictions", type=Path, help="a CSV file to write with every text, its label and predictions"
    )
    parser.add_argument("--show", type=int, default=5, help="examples to print per label (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the draw of the texts to learn from (default: %(default)s)"
    )
    parser.set_defaults(run=_adapt)


def _demo(options: argparse.Namespace) -> int:
    from metafast.demo.run import run

    chosen = vars(options)
    folder = Folder(options.out)
    try:
        config = Config(**{field.name: chosen[field.name] for field in fields(Config) if field.name in chosen})
        results = run(config, folder, resume=options.resume)
    except (ValueError, OSError, ImportError, FloatingPointError, BackendUnavailableError) as error:
        print(f"metafast demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; a checkpoint is in {folder.path}: go on with the same options and --resume",
            file=sys.stderr,
        )
        return 130
    print("\n" + results.table(config))
    files = (folder.result, folder.log, folder.checkpoint, folder.plot)
    print(f"\nwritten to {folder.path}: {', '.join(path.name for path in files)}")
    return 0


def _adapt(options: argparse.Namespace) -> int:
    from metafast.demo.adapt import adapt, table, to_csv
    from metafast.tasks import cldr, read_examples
    from metafast.training.checkpoint import write

    try:
        if options.show < 0:
            raise ValueError(f"show: expected at least 0, got {options.show}")
        if options.file is not None:
            texts = {label: list(of_label) for label, of_label in read_examples(options.file).items()}
        else:
            chosen = cldr.select(options.languages.split(","), "languages")
            texts = {f"{cldr.english_name(code)} ({code})": list(names) for code, names in chosen.items()}
        examples = adapt(Folder(options.checkpoint), texts, shots=options.shots, steps=options.steps, seed=options.seed)
        if options.predictions is not None:
            write(options.predictions, to_csv(examples).encode())
    except (ValueError, OSError, ImportError) as error:
        print(f"metafast adapt: {error}", file=sys.stderr)
        return 1
    print(table(examples, options.show))
    return 0
