"""Meta-training, interruptible."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from types import FrameType

import torch
from torch import nn

from metafast.algorithms.learner import MetaLearner
from metafast.demo.config import Config
from metafast.demo.data import Languages
from metafast.demo.files import Folder, Progress, restore, save, write
from metafast.tasks.text import Batch

SAVE_EVERY = 25
# Of the meta-gradient's norm: single episodes have gradients many times the usual.
MAX_NORM = 1.0


def start(config: Config, folder: Folder, resume: bool) -> Progress:
    """The first state of a training, or the state in the folder's checkpoint.

    Raises:
        ValueError: see :func:`metafast.demo.files.restore`.
    """
    model = config.model()
    optimizer = torch.optim.Adam(model.parameters(), config.outer_lr)
    progress = Progress(model, optimizer, torch.Generator().manual_seed(config.seed))
    if resume:
        restore(folder, config, progress)
        # Lines after the checkpoint are of steps that are taken again.
        lines = folder.log.read_text().splitlines(keepends=True) if folder.log.exists() else []
        write(folder.log, "".join(lines[: progress.iteration]).encode())
    return progress


def train(config: Config, languages: Languages, folder: Folder, progress: Progress, quiet: bool = False) -> None:
    """Meta-trains to the last iteration.

    Writes a line of ``metrics.jsonl`` per iteration, and a checkpoint every 25 iterations and at the end.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; a checkpoint of the last whole step is written.
    """
    from tqdm import tqdm

    meta = config.learner(progress.model)
    bar = tqdm(
        total=config.iterations, initial=progress.iteration, desc=config.algorithm, unit="it", disable=quiet, ncols=100
    )
    with bar, folder.log.open("a") as log, _Interrupt() as interrupt:
        while progress.iteration < config.iterations:
            started = time.perf_counter()
            loss, accuracy = _step(config, meta, languages, progress)
            progress.iteration += 1
            progress.seconds += time.perf_counter() - started
            line = {"iteration": progress.iteration, "loss": loss, "accuracy": accuracy}
            log.write(json.dumps({**line, "seconds": round(progress.seconds, 3)}) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}")
            bar.update()
            last = progress.iteration == config.iterations
            if last or interrupt.requested or progress.iteration % SAVE_EVERY == 0:
                save(folder, config, progress)
            if interrupt.requested:
                raise KeyboardInterrupt


def episodes(config: Config, languages: Languages, generator: torch.Generator) -> tuple[Batch, Batch]:
    """Support and query of a meta-step; half of its tasks, rounded down, are among languages in Latin script alone.

    Scripts tell most languages apart at a glance. Without tasks in which they do not, little is learned of what does.
    """
    same_script = config.tasks // 2
    sizes = (config.ways, config.shots, config.queries, generator)
    drawn = [languages.training.sample(config.tasks - same_script, *sizes)]
    if same_script:
        drawn.append(languages.training_latin.sample(same_script, *sizes))
    support, query = (
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*drawn, strict=True)
    )
    return support, query


def _step(config: Config, meta: MetaLearner, languages: Languages, progress: Progress) -> tuple[float, float]:
    """One meta-step; its loss and the accuracy after adaptation."""
    support, query = episodes(config, languages, progress.episodes)
    for group in progress.optimizer.param_groups:
        group["lr"] = config.outer_lr * 0.5 * (1 + math.cos(math.pi * progress.iteration / config.iterations))
    progress.optimizer.zero_grad()
    loss = meta(support, query)
    loss.backward()
    nn.utils.clip_grad_norm_(meta.model.parameters(), MAX_NORM)
    progress.optimizer.step()
    assert meta.outcome is not None
    return loss.item(), meta.outcome.metrics["accuracy"].mean().item()


class _Interrupt:
    """Turns the first Ctrl-C into a request to stop after the step that is being taken; a second one acts at once."""

    requested = False

    def __enter__(self) -> _Interrupt:
        # Only the main thread may set handlers, and only it is interrupted.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
