"""``python -m metafast bench``: runs the repository's benchmarks and prints their result file as one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(suites: Sequence[str], out: str) -> int:
    """Runs ``suites`` (all where none is named) and writes ``<out>/<device>-<suites>.json``.

    Raises:
        SystemExit: there is no such suite, or the benchmarks are not here (they are not part of the wheel).
    """
    if not BENCHMARKS.is_dir():
        raise SystemExit(f"bench: expected the benchmarks of the repository in {BENCHMARKS}; run this in a clone")
    known = sorted(path.stem.removeprefix("test_") for path in BENCHMARKS.glob("test_*.py"))
    for suite in suites:
        if suite not in known:
            raise SystemExit(f"suite: expected one of {', '.join(known)}, got {suite!r}")
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"bench: {error}; install metafast[bench]") from error

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"{_device()}-{'-'.join(suites) or 'all'}.json"
    files = [str(BENCHMARKS / f"test_{suite}.py") for suite in suites or known]
    # The project's options switch the benchmark plugin off for the tests.
    status = pytest.main([*files, "-q", "-o", "addopts=", "--benchmark-only", "--benchmark-quiet",
                          f"--benchmark-json={result}"])  # fmt: skip
    if status != pytest.ExitCode.OK:
        return int(status)
    print_table(json.loads(result.read_text()))
    print(f"\nwritten to {result}")
    return 0


def print_table(results: dict[str, Any]) -> None:
    """A line a benchmark: what was timed, its median, and how many times the baseline it is, measured side by side."""
    print(f"\n{'case':<52}{'what':<24}{'median':>12}{'GB/s':>8}{'speed-up':>10}  against")
    for entry in sorted(results["benchmarks"], key=lambda entry: entry["group"]):
        info = entry["extra_info"]
        ratio = f"{info['speedup']:.2f}x" if "speedup" in info else ""
        rate = f"{info['gigabytes_per_second']:.1f}" if "gigabytes_per_second" in info else ""
        median = f"{1e3 * entry['stats']['median']:.2f} ms"
        print(f"{entry['group']:<52}{info['what']:<24}{median:>12}{rate:>8}{ratio:>10}  {info.get('baseline', '')}")


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name().lower().replace(" ", "-")
