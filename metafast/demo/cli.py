"""The command line of ``demo``."""

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
