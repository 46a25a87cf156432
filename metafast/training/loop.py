"""The training loop of every algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metafast.algorithms import MAMLPlusPlus
from metafast.algorithms.learner import MetaLearner
from metafast.arguments import check_positive
from metafast.tasks.source import Tasks
from metafast.training.checkpoint import (
    check_state,
    random_states,
    read_checkpoint,
    restore_random_states,
    write_checkpoint,
)
from metafast.training.evaluation import evaluate, on_device
from metafast.training.interrupt import Interrupt
from metafast.training.log import Reports

__all__ = ["CHECKPOINT", "LOG", "Fit", "Validation", "fit"]

CHECKPOINT, LOG = "checkpoint.safetensors", "metrics.jsonl"


@dataclass(frozen=True)
class Validation:
    """Evaluation on held-out classes during a training.

    Args:
        tasks: a source of tasks of classes that do not train.
        every: iterations between evaluations; there is one at the end, too.
        episodes: tasks of an evaluation, the same at each.
        monitor: ``"loss"``, the lower the better, or a metric of ``loss_fn``, the higher the better.
        patience: evaluations without a better one after which the training ends; None: it does not end early.
    """

    tasks: Tasks
    every: int = 100
    episodes: int = 100
    monitor: str = "loss"
    patience: int | None = None

    def __post_init__(self) -> None:
        check_positive("every", self.every)
        check_positive("episodes", self.episodes)
        if self.patience is not None:
            check_positive("patience", self.patience)


@dataclass(frozen=True)
class Fit:
    """What a training came to.

    Args:
        iterations: meta-steps that were taken.
        seconds: that the meta-steps took, without validation.
        best_iteration, best: the iteration whose parameters the model has, and the monitored value there; None without
            validation.
    """

    iterations: int
    seconds: float
    best_iteration: int | None
    best: float | None


@dataclass
class _Progress:
    """All that the next step depends on, besides the arguments of ``fit``."""

    iteration: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_iteration: int | None = None
    worse: int = 0


def fit(
    meta: MetaLearner,
    tasks: Tasks,
    optimizer: Optimizer,
    *,
    iterations: int,
    tasks_per_step: int = 4,
    scheduler: LRScheduler | ReduceLROnPlateau | None = None,
    clip_norm: float | None = None,
    validation: Validation | None = None,
    epoch_length: int = 100,
    seconds: float | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    save_every: int = 100,
    settings: Mapping[str, Any] | None = None,
    workers: int = 0,
    progress: bool = True,
    tensorboard: bool = False,
) -> Fit:
    """Meta-trains. With validation, the parameters of the best evaluation are in the model afterwards.

    With ``folder``, it writes ``metrics.jsonl``, a line per iteration, and ``checkpoint.safetensors`` every ``save_every``
    iterations, at the end, and at Ctrl-C after the step that is being taken. A training that is resumed from it goes on
    bitwise as if it had never stopped: parameters, learned rates, optimizer, schedule, torch's generators, episodes.

    Args:
        meta: any learner; epochs of :class:`metafast.MAMLPlusPlus` go on by ``epoch_length``.
        tasks: the source of training tasks.
        optimizer: any optimizer of the learner's parameters. ``meta.parameters()`` includes learned rates.
        iterations: meta-steps in all, those before a resumption included.
        tasks_per_step: tasks per meta-step.
        scheduler: a schedule of torch, which steps once per iteration; ``ReduceLROnPlateau`` once per evaluation.
        clip_norm: largest norm of the meta-gradient; None: not clipped.
        validation: evaluation during the training, on held-out classes.
        epoch_length: iterations of an epoch of MAML++.
        seconds: of meta-steps, after which the training ends early; None: no limit.
        folder: where files are written, made where it is missing; None: none is.
        resume: whether to go on from the folder's checkpoint.
        save_every: iterations between checkpoints.
        settings: JSON values that a resumed training must have been started with, such as the options of a command.
        workers: processes that draw episodes ahead.
        progress: whether to show a progress bar, where tqdm is installed.
        tensorboard: whether to write TensorBoard's events to ``folder``.

    Raises:
        TypeError, ValueError: an argument is not as described; with ``resume``, the folder has no checkpoint, or one of
            another training; without, it has one.
        FloatingPointError: a loss is not finite; the checkpoint is of an earlier step.
        KeyboardInterrupt: Ctrl-C was pressed; the step was finished and the checkpoint written.
        OSError: a file cannot be written.
        ImportError: with ``folder``, safetensors is missing; or TensorBoard, where it was asked for.
    """
    check_positive("iterations", iterations)
    check_positive("tasks_per_step", tasks_per_step)
    check_positive("epoch_length", epoch_length)
    check_positive("save_every", save_every)
    _check(meta, tasks, optimizer, folder, resume, tensorboard)
    run = _Run(meta, optimizer, scheduler, validation)
    identity = {
        "algorithm": type(meta).__name__,
        "optimizer": type(optimizer).__name__,
        "seed": tasks.seed,
        "tasks_per_step": tasks_per_step,
        **(settings or {}),
    }
    path = None if folder is None else _prepared(Path(folder), resume)
    if path is not None and resume:
        run.restore(path / CHECKPOINT, identity)
    state, done = run.progress, run.progress.iteration
    description = type(meta).__name__ if progress else None
    log = None if path is None else path / LOG
    events = path if tensorboard else None
    with Reports(log, events, iterations, done, description) as reports, Interrupt() as interrupt:
        batches = tasks.batches(
            tasks_per_step, start=done * tasks_per_step, stop=max(iterations, done) * tasks_per_step, workers=workers
        )
        while not run.ended(iterations, seconds):
            started = time.perf_counter()
            support, query = on_device(next(batches), meta.device)
            values = run.step(support, query, clip_norm)
            state.iteration += 1
            state.seconds += time.perf_counter() - started
            if isinstance(meta, MAMLPlusPlus) and state.iteration % epoch_length == 0:
                meta.next_epoch()
            last = state.iteration == iterations or _over(state.seconds, seconds)
            if validation is not None and (last or state.iteration % validation.every == 0):
                values |= run.validate()
            reports.iteration(state.iteration, values, state.seconds)
            last = last or run.ended(iterations, seconds)
            if path is not None and (last or interrupt.requested or state.iteration % save_every == 0):
                run.save(path / CHECKPOINT, identity)
            if interrupt.requested:
                raise KeyboardInterrupt
    if run.best_state:
        meta.load_state_dict(run.best_state)
    return Fit(state.iteration, state.seconds, state.best_iteration, state.best)


class _Run:
    """The parts of a training and their state."""

    def __init__(
        self,
        meta: MetaLearner,
        optimizer: Optimizer,
        scheduler: LRScheduler | ReduceLROnPlateau | None,
        validation: Validation | None,
    ) -> None:
        self.meta = meta
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.validation = validation
        self.progress = _Progress()
        self.best_state: dict[str, Any] = {}

    def ended(self, iterations: int, seconds: float | None) -> bool:
        """Whether no step is to be taken."""
        patience = None if self.validation is None else self.validation.patience
        stopped = patience is not None and self.progress.worse >= patience
        return stopped or self.progress.iteration >= iterations or _over(self.progress.seconds, seconds)

    def step(self, support: Any, query: Any, clip_norm: float | None) -> dict[str, float]:
        """Takes one meta-step; its loss and metrics."""
        self.optimizer.zero_grad()
        loss: Tensor = self.meta(support, query)
        loss.backward()
        if clip_norm is not None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, clip_norm)
        self.optimizer.step()
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        assert self.meta.outcome is not None
        metrics = self.meta.outcome.metrics
        return {"loss": loss.item(), **{name: values.double().mean().item() for name, values in metrics.items()}}

    def validate(self) -> dict[str, float]:
        """Evaluates on held-out classes, and remembers the parameters where they are the best so far."""
        assert self.validation is not None
        state, monitor = self.progress, self.validation.monitor
        found = evaluate(self.meta, self.validation.tasks, self.validation.episodes, steps=[self.meta.steps])
        if monitor not in found.values:
            raise ValueError(f"monitor: expected one of {', '.join(found.values)}, got {monitor!r}")
        means = {name: found.interval(name).mean for name in found.values}
        value = means[monitor]
        sign = 1 if monitor == "loss" else -1
        if not math.isnan(value) and (state.best is None or sign * value < sign * state.best):
            state.best, state.best_iteration, state.worse = value, state.iteration, 0
            self.best_state = _copied(self.meta.state_dict())
        else:
            state.worse += 1
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(value)
        return {f"validation_{name}": mean for name, mean in means.items()}

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Writes the checkpoint."""
        from metafast.version import __version__

        state = {
            "settings": dict(identity),
            "metafast": __version__,
            "torch": torch.__version__,
            "progress": dict(vars(self.progress)),
            "meta": self.meta.state_dict(),
            "best": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "random": random_states(),
        }
        write_checkpoint(path, state)

    def restore(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Puts everything back to the checkpoint."""
        state = read_checkpoint(path)
        check_settings(path, identity, state["settings"])
        check_state(self.meta, state["meta"], path)
        if (self.scheduler is None) != (state["scheduler"] is None):
            raise ValueError("resume: expected a scheduler exactly where the checkpoint's training had one")
        self.meta.load_state_dict(state["meta"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.progress, self.best_state = _Progress(**state["progress"]), state["best"]
        restore_random_states(state["random"])


def check_settings(path: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises ValueError where a checkpoint is of other settings; the message says which."""
    differences = list(_differences(ours, theirs))
    if differences:
        raise ValueError(f"resume: expected the settings of the checkpoint in {path.parent}: " + "; ".join(differences))


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        asked, found = ours.get(name), theirs.get(name)
        if isinstance(asked, Mapping) and isinstance(found, Mapping):
            yield from _differences(asked, found)
        elif asked != found:
            yield f"{name} is {found}, asked for is {asked}"


def _check(meta: Any, tasks: Any, optimizer: Any, folder: str | Path | None, resume: bool, tensorboard: bool) -> None:
    for name, value, kind, expected in (
        ("meta", meta, MetaLearner, "a learner of metafast"),
        ("tasks", tasks, Tasks, "a source of metafast.tasks"),
        ("optimizer", optimizer, Optimizer, "an optimizer of torch"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if folder is None and (resume or tensorboard):
        raise ValueError("folder: expected one with resume or tensorboard, got None")


def _prepared(folder: Path, resume: bool) -> Path:
    """The folder, which can be written and has a checkpoint exactly where a training is resumed."""
    import safetensors  # noqa: F401

    checkpoint = folder / CHECKPOINT
    if resume and not checkpoint.exists():
        raise ValueError(f"resume: expected a checkpoint in {folder}, found none")
    if not resume and checkpoint.exists():
        raise ValueError(
            f"folder: expected no earlier training, got one in {folder}; pass resume=True or another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _over(seconds: float, limit: float | None) -> bool:
    return limit is not None and seconds >= limit


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
