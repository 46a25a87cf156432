"""``python -m metafast info | demo | train | evaluate | adapt | check | bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 for a failure with a message, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="metafast", description="Fast, exact and memory-lean meta-learning of Transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="versions, how the extension was built, which backends are usable")
    info.add_argument(
        "--kernels", action="store_true", help="compile every Triton kernel (no GPU needed) and list what it takes"
    )
    info.set_defaults(run=_info)

    from metafast.demo import cli

    cli.add_demo(
        commands.add_parser("demo", help="meta-train a Transformer to tell languages apart from five names of each")
    )

    from metafast.commands import cli as own

    own.add_train(commands.add_parser("train", help="meta-train a few-shot classifier on your own labelled texts"))
    own.add_evaluate(commands.add_parser("evaluate", help="its accuracy on classes that it was not trained on"))
    own.add_adapt(
        commands.add_parser("adapt", help="adapt a trained checkpoint to your own classes or other languages")
    )

    check = commands.add_parser("check", help="compare the fused path with the reference in float64")
    check.set_defaults(run=_check)

    bench = commands.add_parser("bench", help="run the benchmarks of the repository and print one table")
    bench.add_argument("suite", nargs="*", help="as benchmarks/README.md lists them; all where none is named")
    bench.add_argument("--out", default="runs/bench", help="folder of the result file (default: %(default)s)")
    bench.add_argument("--select", default="", metavar="EXPRESSION", help="only the cases that match, as pytest's -k")
    bench.add_argument("--compile", action="store_true", help="also the peers that torch.compile has to build first")
    bench.add_argument(
        "--from", dest="result", metavar="FILE", help="run nothing: print and plot this result file again"
    )
    bench.set_defaults(run=_bench)

    options = parser.parse_args(arguments)
    return int(options.run(options) or 0)


def _info(options: argparse.Namespace) -> int:
    if options.kernels:
        from metafast.ops.attention.triton.compile import compile_kernels, print_report

        print_report(compile_kernels())
        return 0
    from metafast.backend import build_info

    _print_nested(build_info())
    return 0


def _print_nested(entries: dict[str, Any], indent: str = "") -> None:
    for name, value in entries.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_nested(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value if value is not None else 'none'}")


def _check(options: argparse.Namespace) -> int:
    from metafast.selfcheck import run

    return run()


def _bench(options: argparse.Namespace) -> int:
    from metafast import bench

    if options.result is not None:
        return bench.report(options.result)
    return bench.run(options.suite, options.out, compiling=options.compile, select=options.select)


if __name__ == "__main__":
    sys.exit(main())
