"""The report at the end of a run: one table, one file of numbers, one plot."""

from __future__ import annotations

import io
import resource
import sys
from dataclasses import dataclass
from typing import Any

from metafast.demo.config import Config
from metafast.demo.evaluation import STEPS
from metafast.demo.files import Folder, write_json
from metafast.training import Interval
from metafast.training.checkpoint import write

By = dict[int, Interval]


@dataclass(frozen=True)
class Results:
    """Accuracies by the number of inner steps, on held-out languages, and what the run took."""

    accuracy: By
    accuracy_latin: By
    baseline: By
    baseline_latin: By
    baseline_learning_rates: dict[int, float]
    meta_gradient_error: float
    seconds: dict[str, float]
    iterations: int

    def to_json(self, config: Config) -> dict[str, Any]:
        def means(by: By) -> dict[str, float]:
            return {str(steps): round(found.mean, 4) for steps, found in by.items()}

        def intervals(by: By) -> dict[str, float]:
            return {str(steps): round(found.half_width, 4) for steps, found in by.items()}

        return {
            "accuracy": means(self.accuracy),
            "accuracy_interval": intervals(self.accuracy),
            "accuracy_latin": means(self.accuracy_latin),
            "baseline_accuracy": means(self.baseline),
            "baseline_accuracy_interval": intervals(self.baseline),
            "baseline_accuracy_latin": means(self.baseline_latin),
            "baseline_learning_rates": {str(steps): lr for steps, lr in self.baseline_learning_rates.items()},
            "episodes": next(iter(self.accuracy.values())).tasks,
            "meta_gradient_error": self.meta_gradient_error,
            "seconds": round(sum(self.seconds.values()), 1),
            "seconds_by_part": {name: round(value, 1) for name, value in self.seconds.items()},
            "peak_memory_mib": round(peak_memory_mib()),
            "iterations": self.iterations,
            "config": config.to_json(),
        }

    def table(self, config: Config) -> str:
        rows = {
            config.algorithm: self.accuracy,
            "baseline": self.baseline,
            f"{config.algorithm}, Latin script": self.accuracy_latin,
            "baseline, Latin script": self.baseline_latin,
        }
        episodes = next(iter(self.accuracy.values())).tasks
        lines = [
            f"Accuracy on languages that no training saw: {config.ways} ways, {config.shots} shots, {episodes} episodes, "
            "mean ± 95 % interval",
            "",
            f"{'inner steps':<26}" + "".join(f"{steps:>17}" for steps in STEPS),
            *(f"{name:<26}" + "".join(f"{by[steps]!s:>17}" for steps in STEPS) for name, by in rows.items()),
            "",
            f"best at 10 steps: {max((config.algorithm, 'baseline'), key=lambda name: rows[name][10].mean)}",
            f"error of the meta-gradient against the reference path in float64: {self.meta_gradient_error:.1e}",
            "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items()),
            f"peak memory of the process: {peak_memory_mib():.0f} MiB",
        ]
        return "\n".join(lines)


def write_results(folder: Folder, config: Config, results: Results) -> None:
    write(folder.plot, _plot(config, results))
    write_json(folder.result, results.to_json(config))


def peak_memory_mib() -> float:
    """The peak memory of this process, as the operating system counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _plot(config: Config, results: Results) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, by in ((config.algorithm, results.accuracy), ("baseline: train jointly, fine-tune", results.baseline)):
        means, widths = [by[steps].mean for steps in STEPS], [by[steps].half_width for steps in STEPS]
        axes.errorbar(range(len(STEPS)), means, widths, marker="o", capsize=3, label=name)
    axes.axhline(1 / config.ways, color="grey", linestyle=":", label="chance")
    axes.set(
        xticks=range(len(STEPS)),
        xticklabels=STEPS,
        xlabel="steps of adaptation",
        ylabel="accuracy on held-out languages",
        ylim=(0, 1),
        title=f"{config.ways} unseen languages from {config.shots} names of each",
    )
    axes.legend(loc="lower right")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()
