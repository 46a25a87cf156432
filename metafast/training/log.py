"""What a training reports while it runs: a progress bar, JSON lines, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metafast.training.checkpoint import write

__all__ = ["Reports"]


class Reports:
    """Reports of a training, of which each goes where it was asked for.

    Args:
        path: file of JSON lines, one per iteration; None: none.
        events: folder of TensorBoard's events; None: none.
        total, done: iterations in all, and those that a resumed training has behind it.
        description: what the bar begins with; None: no bar.

    Raises:
        ImportError: TensorBoard was asked for and is missing.
    """

    def __init__(self, path: Path | None, events: Path | None, total: int, done: int, description: str | None) -> None:
        self._writer = _tensorboard(events, done) if events is not None else None
        if path is not None:
            # Later lines, and those of a training that left no checkpoint, are of steps that are taken again.
            write(path, "".join(_kept_lines(path, done)).encode())
        self._file = path.open("a", encoding="utf-8") if path is not None else None
        self._bar = _bar(total, done, description)
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *error: object) -> None:
        for report in (self._bar, self._file, self._writer):
            if report is not None:
                report.close()

    def iteration(self, number: int, values: Mapping[str, float], seconds: float) -> None:
        """Reports one iteration.

        Args:
            number: of the iteration, from 1.
            values: numbers by name.
            seconds: that the training has taken so far.
        """
        if self._file is not None:
            line = {"iteration": number, **values, "seconds": round(seconds, 3)}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, number)
        if self._bar is not None:
            self._shown |= {name.replace("validation_", "val_"): f"{value:.3f}" for name, value in values.items()}
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update()


def _kept_lines(path: Path, done: int) -> list[str]:
    """Whole lines of the first ``done`` iterations."""
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            number = json.loads(line)["iteration"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if number <= done:
            kept.append(line + "\n")
    return kept


def _bar(total: int, done: int, description: str | None) -> Any:
    if description is None:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, desc=description, unit="it", dynamic_ncols=True)


def _tensorboard(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"tensorboard: expected the package tensorboard ({error})") from error
    return SummaryWriter(str(folder), purge_step=done + 1 if done else None)
