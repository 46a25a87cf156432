"""``python -m metafast bench``: runs the repository's benchmarks; their result file becomes one table and plots."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# A figure has panels, a panel lines, a line points.
Lines = dict[str, dict[Any, float]]
Figures = dict[str, dict[str, "Panel"]]
UNITS = {"time": (1e3, "ms"), "memory": (2**-20, "MiB")}


class Panel:
    """One pair of axes: ``lines[name][x]`` is a cost or a ratio."""

    def __init__(self, xlabel: str, ylabel: str) -> None:
        self.xlabel = xlabel
        self.ylabel = ylabel
        self.lines: Lines = defaultdict(dict)


def run(suites: Sequence[str], out: str, *, compiling: bool = False, select: str = "") -> int:
    """Runs ``suites`` (all where none is named) and writes ``<out>/<device>-<suites>.json`` and plots beside it.

    Args:
        suites: names of suites.
        out: folder of the result file.
        compiling: also the peers that torch.compile has to build first.
        select: an expression for pytest's ``-k``.

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
    result.unlink(missing_ok=True)
    files = [str(BENCHMARKS / f"test_{suite}.py") for suite in suites or known]
    options = [*(["--compile"] if compiling else []), *(["-k", select] if select else [])]
    # The project's options switch the benchmark plugin off for the tests. That nothing was saved, since all failed, is a
    # warning of the plugin's: as an error it would hide why.
    plugin = ["-o", "addopts=", "-W", "default::pytest_benchmark.logger.PytestBenchmarkWarning", "--benchmark-only"]
    saved = ["--benchmark-quiet", f"--benchmark-json={result}"]
    status = pytest.main([*files, *options, "-q", "-rs", *plugin, *saved])
    if result.exists() and result.stat().st_size:
        # Also after a failure, which may be the last of an hour's benchmarks.
        report(str(result))
    return int(status)


def report(result: str) -> int:
    """Prints the table of a result file and draws its plots beside it.

    Raises:
        SystemExit: it cannot be read.
    """
    path = Path(result)
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench: expected a result file of a benchmark, got {result}: {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("benchmarks"), list):
        raise SystemExit(f"bench: expected a result file of a benchmark, got {result} without a list of benchmarks")
    print("\n".join(table(results)))
    print(f"\nfrom {path}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed; install metafast[bench]")
        return 0
    for name, panels in figures(results).items():
        plot = path.with_name(f"{path.stem}-{name}.png")
        _draw(plot, panels)
        print(f"plotted {plot}")
    return 0


def table(results: dict[str, Any]) -> list[str]:
    """One line per comparison: the case, its cost, the peer's cost, their ratio measured side by side, and the bar."""
    entries = [entry for entry in results["benchmarks"] if not entry.get("error")]
    width = max([len(entry["group"]) for entry in entries], default=4) + 2
    peers = [comparison["with"] for entry in entries for comparison in entry["extra_info"].get("comparisons", [])]
    other = max([len(peer) for peer in peers], default=7) + 2
    lines = [f"{'case':<{width}}{'what':<26}{'cost':>14}  {'against':<{other}}{'cost':>14}{'ratio':>9}{'bar':>7}"]
    for entry in sorted(entries, key=lambda entry: entry["group"]):
        info = entry["extra_info"]
        case = f"{entry['group']:<{width}}{info['what']:<26}"
        if not info.get("comparisons"):
            lines.append(f"{case}{_cost('time', entry['stats']['median']):>14}")
        for found in info.get("comparisons", []):
            own, others = _cost(found["of"], found["own"]), _cost(found["of"], found["other"])
            bar = "" if found["bar"] is None else f"{found['bar']:.2f}"
            verdict = "" if found["bar"] is None or found["ratio"] >= found["bar"] else "  missed"
            ratio = f"{found['ratio']:.2f}x"
            rate = f"  {info['gigabytes_per_second']:.1f} GB/s" if "gigabytes_per_second" in info else ""
            lines.append(f"{case}{own:>14}  {found['with']:<{other}}{others:>14}{ratio:>9}{bar:>7}{verdict}{rate}")
    return lines


def figures(results: dict[str, Any]) -> Figures:
    """The figures, from the entries that have a place in one (``plot`` of ``extra_info``)."""
    found: Figures = defaultdict(dict)
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        place = info.get("plot")
        for compared in info.get("comparisons", []) if place else []:
            ratios = place.get("y") == "ratio"
            scale, unit = UNITS.get(compared["of"], (1, compared["of"]))
            ylabel = f"{compared['of']}, times ours" if ratios else f"{compared['of']}, {unit}"
            panel = found[place["figure"]].setdefault(place["panel"], Panel(place["xlabel"], ylabel))
            if ratios:
                panel.lines[compared["with"]][place["x"]] = compared["ratio"]
            else:
                panel.lines[info["what"]][place["x"]] = scale * compared["own"]
                panel.lines[compared["with"]][place["x"]] = scale * compared["other"]
    return found


def _cost(of: str, value: float) -> str:
    scale, unit = UNITS.get(of, (1, of))
    return f"{scale * value:.2f} {unit}"


def _draw(path: Path, panels: dict[str, Panel]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, panel) in zip(grid, panels.items(), strict=False):
        # The same order of places on the axis for every line, also where a line has no point.
        places = list(dict.fromkeys(x for line in panel.lines.values() for x in line))
        named = any(isinstance(x, str) for x in places)
        for name, line in panel.lines.items():
            points = [(places.index(x) if named else x, y) for x, y in line.items()]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(title=title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if named:
            axes.set_xticks(range(len(places)), places)
            axes.axhline(1, color="grey", linestyle=":")
            axes.set_ylim(bottom=0)
        else:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        axes.legend(fontsize="small")
    for axes in list(grid):
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name().lower().replace(" ", "-")
