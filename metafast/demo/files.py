"""The files of a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from metafast.demo.config import Config
from metafast.training.checkpoint import check_state, read_checkpoint, read_metadata, write
from metafast.training.loop import CHECKPOINT, LOG, check_settings

_MODEL = "model."


@dataclass(frozen=True)
class Folder:
    """A run's folder: ``checkpoint.safetensors``, ``metrics.jsonl``, ``metrics.json``, ``accuracy.png``."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def log(self) -> Path:
        return self.path / LOG

    @property
    def result(self) -> Path:
        return self.path / "metrics.json"

    @property
    def plot(self) -> Path:
        return self.path / "accuracy.png"

    def settings(self) -> dict[str, Any]:
        """The settings of the checkpoint. Raises ValueError where there is none."""
        found: dict[str, Any] = read_metadata(self.checkpoint)["settings"]
        return found

    def expect_checkpoint(self) -> None:
        """Raises ValueError where there is none to resume."""
        if not self.checkpoint.exists():
            raise ValueError(f"resume: expected a checkpoint in {self.path}, found none")

    def prepare(self, resume: bool) -> str | None:
        """Makes sure that results can be written before any is computed; sets an earlier run's folder aside.

        Returns:
            where the earlier run now is, None where there was none.

        Raises:
            ValueError: the folder cannot be written, or with ``resume`` there is no checkpoint in it.
        """
        if resume:
            self.expect_checkpoint()
        with self._writing():
            self._probe()
            if resume or not (self.checkpoint.exists() or self.result.exists()):
                return None
            names = (self.path.with_name(f"{self.path.name}.previous-{number}") for number in itertools.count(1))
            moved = next(path for path in names if not path.exists())
            self.path.rename(moved)
            self.path.mkdir()
        return str(moved)

    def check_writable(self) -> None:
        """Makes the folder where it is missing. Raises ValueError where it cannot be written."""
        with self._writing():
            self._probe()

    def _probe(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / ".writable"
        probe.touch()
        probe.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"out: expected a folder that can be written, got {self.path} ({error})") from error


def write_json(path: Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_settings(folder: Folder) -> tuple[Config, int]:
    """The settings of a checkpoint, and its iteration.

    Raises:
        ValueError: there is no checkpoint of the demo in the folder.
    """
    try:
        state = read_metadata(folder.checkpoint)
        return Config.from_json(state["settings"]["config"]), state["progress"]["iteration"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint: expected a checkpoint of metafast demo or train in {folder.path} ({error})"
        ) from error


def check_resumable(folder: Folder, config: Config) -> None:
    """Raises ValueError where the folder's checkpoint is of other settings; the message says what differs."""
    folder.expect_checkpoint()
    check_settings(folder.checkpoint, config.to_json(), read_settings(folder)[0].to_json())


def load_model(folder: Folder, model: nn.Module) -> None:
    """Fills ``model`` with a checkpoint's parameters, with validation those of the best evaluation.

    Raises:
        ValueError: the checkpoint cannot be read, or it is of another architecture; the message says what differs.
    """
    checkpoint = read_checkpoint(folder.checkpoint)
    state = checkpoint.get("best") or checkpoint["meta"]
    found = {name.removeprefix(_MODEL): value for name, value in state.items() if name.startswith(_MODEL)}
    check_state(model, found, folder.path)
    model.load_state_dict(found)
