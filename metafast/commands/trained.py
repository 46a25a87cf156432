"""What a run's folder holds, of ``train`` or of ``demo``, ready to adapt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metafast.algorithms.learner import MetaLearner
from metafast.commands.network import Network
from metafast.commands.settings import Settings
from metafast.demo.files import Folder, load_model, read_settings
from metafast.training.checkpoint import read_metadata

__all__ = ["Run", "Trained", "read_run"]


@dataclass(frozen=True)
class Run:
    """A checkpoint of ``train``.

    Args:
        settings: of the training.
        test: the classes that were kept for testing.
        iteration: meta-steps that were taken.
    """

    settings: Settings
    test: tuple[str, ...]
    iteration: int


def read_run(folder: Folder) -> Run:
    """The settings of a checkpoint of ``train``.

    Raises:
        ValueError: the folder has none.
    """
    try:
        state = read_metadata(folder.checkpoint)
        stored = state["settings"]
        return Run(Settings.from_json(stored["train"]), tuple(stored["test"]), state["progress"]["iteration"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"checkpoint: expected a checkpoint of metafast train in {folder.path} ({reason})") from error


@dataclass(frozen=True)
class Trained:
    """A trained model, of which learners are made.

    Args:
        learner: from a number of classes to a learner with the trained parameters, those of the best validation.
        ways: classes of a task in training.
        more_ways: whether there may be more classes than that.
        shots: texts per class in training.
        steps: inner steps in training, 0 of ProtoNet.
        max_length: bytes or tokens of a text that are kept.
        tokenizer: as :class:`metafast.tasks.FewShot` takes it; None: bytes.
    """

    learner: Callable[[int], MetaLearner]
    ways: int
    more_ways: bool
    shots: int
    steps: int
    max_length: int
    tokenizer: Callable[..., Any] | None

    @classmethod
    def read(cls, folder: Folder) -> Trained:
        """The model of a folder of ``train`` or ``demo``.

        Raises:
            ValueError: the folder has no checkpoint, or it does not fit its settings.
            ImportError: a package that the model needs is missing.
        """
        if _is_of_train(folder):
            settings = read_run(folder).settings
            network = Network.saved(settings, folder.path)
            return cls(
                network.learner,
                settings.ways,
                settings.by_prototypes,
                settings.shots,
                0 if settings.adapt == "none" else settings.steps,
                settings.max_length,
                network.tokenizer,
            )
        config, _ = read_settings(folder)
        model = config.model()
        load_model(folder, model)
        meta = config.learner(model)
        return cls(lambda ways: meta, config.ways, False, config.shots, config.steps, config.max_length, None)


def _is_of_train(folder: Folder) -> bool:
    try:
        return "train" in folder.settings()
    except (KeyError, TypeError, ValueError):
        return False
