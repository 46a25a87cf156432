"""The files of a run: written whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metafast.demo.config import Config

_PARAMETER = "model."
_OPTIMIZER = "optimizer."
_GENERATOR = "episodes"
_ITERATION = "iteration"


@dataclass(frozen=True)
class Folder:
    """A run's folder: ``checkpoint.safetensors`` and ``.json``, ``metrics.jsonl``, ``metrics.json``, ``accuracy.png``."""

    path: Path

    @property
    def tensors(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def settings(self) -> Path:
        return self.path / "checkpoint.json"

    @property
    def log(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "metrics.json"

    @property
    def plot(self) -> Path:
        return self.path / "accuracy.png"

    def expect_checkpoint(self) -> None:
        """Raises ValueError where there is none to resume."""
        if not self.settings.exists():
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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
            if resume or not (self.settings.exists() or self.result.exists()):
                return None
            names = (self.path.with_name(f"{self.path.name}.previous-{number}") for number in itertools.count(1))
            moved = next(path for path in names if not path.exists())
            self.path.rename(moved)
            self.path.mkdir()
        except OSError as error:
            raise ValueError(f"out: expected a folder that can be written, got {self.path} ({error})") from error
        return str(moved)


@dataclass
class Progress:
    """The state of a training: everything that its next step depends on, besides the settings."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    episodes: torch.Generator
    iteration: int = 0
    seconds: float = 0.0


def write(path: Path, data: bytes) -> None:
    """Replaces a file at once: a reader finds the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def save(folder: Folder, config: Config, progress: Progress) -> None:
    """Writes a checkpoint. The settings come last and name the iteration: a pair that disagrees is recognised."""
    from safetensors.torch import save as to_bytes

    from metafast.version import __version__

    tensors = {_PARAMETER + name: value for name, value in progress.model.state_dict().items()}
    for index, state in progress.optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors[_GENERATOR] = progress.episodes.get_state()
    tensors[_ITERATION] = torch.tensor(progress.iteration)
    write(folder.tensors, to_bytes({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))
    write_json(
        folder.settings,
        {
            "config": config.to_json(),
            "iteration": progress.iteration,
            "seconds": progress.seconds,
            "metafast": __version__,
            "torch": torch.__version__,
        },
    )


def read_settings(folder: Folder) -> tuple[Config, dict[str, Any]]:
    """The settings of a checkpoint.

    Raises:
        ValueError: there is no checkpoint in the folder, or its settings cannot be read.
    """
    try:
        settings = json.loads(folder.settings.read_text())
        return Config.from_json(settings["config"]), settings
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: expected a checkpoint of the demo in {folder.path} ({error})") from error


def check_settings(folder: Folder, config: Config) -> dict[str, Any]:
    """The file of a checkpoint's settings, which are those of ``config``.

    Raises:
        ValueError: they are not; the message says what differs.
    """
    saved, settings = read_settings(folder)
    ours, theirs = config.to_json(), saved.to_json()
    differences = [
        f"{name} is {theirs[name]}, asked for is {ours[name]}" for name in ours if ours[name] != theirs[name]
    ]
    if differences:
        raise ValueError(f"resume: expected the settings of the checkpoint in {folder.path}: " + "; ".join(differences))
    return settings


def load_model(folder: Folder, model: nn.Module) -> dict[str, Tensor]:
    """Fills ``model`` with a checkpoint's parameters and returns the checkpoint's other tensors.

    Raises:
        ValueError: the checkpoint cannot be read, its two files are of different iterations, or it is of another
            architecture; the message says what differs.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(folder.tensors.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint: expected tensors in {folder.tensors} ({error})") from error
    iteration, expected_iteration = (
        int(tensors.pop(_ITERATION, torch.tensor(-1))),
        read_settings(folder)[1]["iteration"],
    )
    if iteration != expected_iteration:
        raise ValueError(
            f"checkpoint: expected tensors of iteration {expected_iteration} in {folder.tensors}, got those of {iteration}"
        )
    found = {name.removeprefix(_PARAMETER): tensors.pop(name) for name in list(tensors) if name.startswith(_PARAMETER)}
    expected = model.state_dict()
    differences = [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is not a parameter of the model" for name in found if name not in expected),
        *(
            f"{name} has shape {list(found[name].shape)}, the model's {list(expected[name].shape)}"
            for name in expected
            if name in found and found[name].shape != expected[name].shape
        ),
    ]
    if differences:
        raise ValueError(
            f"checkpoint: expected the parameters of this architecture, got another in {folder.path}: "
            + "; ".join(differences[:5])
            + ("" if len(differences) <= 5 else f"; and {len(differences) - 5} more")
        )
    model.load_state_dict(found)
    return tensors


def restore(folder: Folder, config: Config, progress: Progress) -> None:
    """Puts a training back to its checkpoint.

    Raises:
        ValueError: the checkpoint is of other settings or of another architecture; the message says what differs.
    """
    settings = check_settings(folder, config)
    tensors = load_model(folder, progress.model)
    progress.episodes.set_state(tensors.pop(_GENERATOR))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, entry = name.removeprefix(_OPTIMIZER).split(".", 1)
        state.setdefault(int(index), {})[entry] = value
    progress.optimizer.load_state_dict({**progress.optimizer.state_dict(), "state": state})
    progress.iteration, progress.seconds = settings["iteration"], settings["seconds"]
