"""The demo from beginning to end: train, train the baseline, evaluate both, report."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from metafast.backend import use_backend
from metafast.checking import meta_gradient_error
from metafast.demo.baseline import pretrain, search_learning_rates
from metafast.demo.config import Config
from metafast.demo.data import Languages, LanguageTasks
from metafast.demo.evaluation import STEPS, accuracy_after
from metafast.demo.files import Folder, check_resumable
from metafast.demo.report import Results, write_results
from metafast.demo.training import train

# Seeds of the evaluation's episodes; those of training start at the run's own seed.
TEST_SEED, LATIN_SEED, VALIDATION_SEED = 1_000_001, 1_000_002, 1_000_003


@dataclass(frozen=True)
class Effort:
    """Numbers of episodes of the evaluation: on held-out languages, to choose rates, on languages in Latin script."""

    test: int = 200
    validation: int = 40
    latin: int = 100


def run(
    config: Config,
    folder: Folder,
    *,
    resume: bool = False,
    effort: Effort | None = None,
    languages: Languages | None = None,
    quiet: bool = False,
) -> Results:
    """Runs the demo and writes its files.

    Raises:
        ValueError, BackendUnavailableError, ImportError: the settings cannot be run, the folder cannot be written, or there
            is nothing to resume in it; before anything is moved or written.
        KeyboardInterrupt: after writing a checkpoint.
    """
    effort = effort or Effort()
    if resume:
        check_resumable(folder, config)
    seconds: dict[str, float] = {}
    with use_backend(config.backend):
        with _timed(seconds, "data"):
            languages = languages or Languages.load()
        _rehearse(config, languages)
        moved = folder.prepare(resume)
        if moved and not quiet:
            print(f"the results of an earlier run are now in {moved}")
        trained = train(config, languages, folder, resume=resume, quiet=quiet)
        seconds["training"] = trained.result.seconds
        with _timed(seconds, "baseline"):
            baseline = pretrain(config, languages.training, trained.result.seconds, quiet)
        with _timed(seconds, "evaluation"):
            rates = search_learning_rates(baseline, config, languages.validation, effort.validation, VALIDATION_SEED)
            ours = dict.fromkeys(STEPS, config.inner_lr)
            test = (config, languages.test, effort.test, TEST_SEED)
            latin = (config, languages.test_latin, effort.latin, LATIN_SEED)
            accuracy, accuracy_latin = (accuracy_after(trained.model, ours, *on) for on in (test, latin))
            theirs, theirs_latin = (accuracy_after(baseline, rates, *on) for on in (test, latin))
            error = _meta_gradient_error(config, languages, trained.model)
    results = Results(
        accuracy=accuracy,
        accuracy_latin=accuracy_latin,
        baseline=theirs,
        baseline_latin=theirs_latin,
        baseline_learning_rates=rates,
        meta_gradient_error=error,
        seconds=seconds,
        iterations=trained.result.iterations,
    )
    write_results(folder, config, results)
    return results


def _rehearse(config: Config, languages: Languages) -> None:
    """Raises the error of wrong settings, or of missing packages, before an earlier run's results are touched."""
    for name in ("matplotlib", "safetensors", "tqdm"):
        importlib.import_module(name)
    languages.check(config)
    batches = next(LanguageTasks(config, languages).batches(config.tasks))
    config.learner(config.model())(*batches).backward()


def _meta_gradient_error(config: Config, languages: Languages, model: torch.nn.Module) -> float:
    batches = next(LanguageTasks(config, languages).batches(config.tasks))
    return meta_gradient_error(config.learner(model), *batches, backend=config.backend)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
