"""The demo on a tiny model: what it writes, that it goes on where it stopped, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys

import pytest
import torch

import metafast
from metafast.__main__ import main
from metafast.commands.adapt import adapt
from metafast.demo.baseline import with_new_head
from metafast.demo.config import Config
from metafast.demo.data import Languages
from metafast.demo.evaluation import accuracy_after
from metafast.demo.files import Folder, load_model, read_settings
from metafast.demo.run import Effort, run
from metafast.demo.training import train
from metafast.training import loop
from metafast.training.checkpoint import write_checkpoint

TINY = {
    "ways": 3,
    "shots": 2,
    "queries": 2,
    "steps": 2,
    "tasks": 2,
    "width": 8,
    "heads": 2,
    "layers": 1,
    "max_length": 8,
}


def config(**changes) -> Config:
    return Config(**{**TINY, "iterations": 6, **changes})


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Four labels with letters of their own, so that something can be learned at once."""
    return {name: [first + second for first in name for second in name] for name in ("abcd", "efgh", "ijkl", "mnop")}


@pytest.fixture(scope="module")
def languages(texts) -> Languages:
    return Languages(texts, texts, texts, texts, texts)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "run")


def run_tiny(folder, languages, settings=None, **options):
    return run(
        settings or config(),
        folder,
        effort=Effort(test=4, validation=4, latin=4),
        languages=languages,
        quiet=True,
        **options,
    )


def parameters(folder: Folder) -> dict[str, torch.Tensor]:
    settings, _ = read_settings(folder)
    model = settings.model()
    load_model(folder, model)
    return model.state_dict()


def log(folder: Folder) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [{name: line[name] for name in ("iteration", "loss", "accuracy")} for line in lines]


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
def test_what_a_run_writes(folder, languages, algorithm):
    results = run_tiny(folder, languages, config(algorithm=algorithm))
    written = json.loads(folder.result.read_text())
    assert set(written["accuracy"]) == set(written["baseline_accuracy"]) == {"0", "1", "3", "10"}
    assert all(0 <= value <= 1 for value in written["accuracy"].values())
    assert written["meta_gradient_error"] < 1e-4
    assert written["seconds"] > 0
    assert written["config"]["algorithm"] == algorithm
    assert [line["iteration"] for line in log(folder)] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["loss"]) for line in log(folder))
    assert folder.plot.read_bytes().startswith(b"\x89PNG")
    assert "baseline" in results.table(config(algorithm=algorithm))
    assert not list(folder.path.glob("*.partial"))


def test_backends_agree(tmp_path, languages):
    folders = {backend: Folder(tmp_path / backend) for backend in ("fused", "reference")}
    for backend, folder in folders.items():
        run_tiny(folder, languages, config(backend=backend))
    for fused, reference in zip(*(log(folder) for folder in folders.values()), strict=True):
        assert abs(fused["loss"] - reference["loss"]) < 1e-4


def interrupt_after(monkeypatch, steps):
    """Ctrl-C in the middle of a step."""
    real, taken = loop._Run.step, []

    def step(*args):
        taken.append(1)
        if len(taken) == steps:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loop._Run, "step", step)


def test_interrupted_and_resumed_is_the_same_run(tmp_path, languages, monkeypatch):
    whole, parts = Folder(tmp_path / "whole"), Folder(tmp_path / "parts")
    run_tiny(whole, languages)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(parts, languages)
    assert read_settings(parts)[1] == 4
    with parts.log.open("a") as file:  # as if it had been killed two steps after its last checkpoint
        file.write('{"iteration": 5}\n{"iteration": 6}\n')
    run_tiny(parts, languages, resume=True)
    assert log(parts) == log(whole)
    expected = parameters(whole)
    for name, value in parameters(parts).items():
        assert torch.equal(value, expected[name]), name
    accuracies = [json.loads(folder.result.read_text())["accuracy"] for folder in (whole, parts)]
    assert accuracies[0] == accuracies[1]


def test_a_failure_in_training_leaves_the_last_checkpoint(folder, languages, monkeypatch):
    monkeypatch.setattr("metafast.demo.training.SAVE_EVERY", 2)
    real, taken = loop._Run.step, []

    def step(*args):
        taken.append(1)
        if len(taken) == 4:
            raise FloatingPointError("a loss")
        return real(*args)

    monkeypatch.setattr(loop._Run, "step", step)
    with pytest.raises(FloatingPointError):
        run_tiny(folder, languages)
    assert read_settings(folder)[1] == 2
    assert not folder.result.exists()


def test_an_earlier_run_is_set_aside(folder, languages):
    run_tiny(folder, languages)
    before = folder.result.read_text()
    run_tiny(folder, languages, config(seed=1))
    assert (folder.path.with_name("run.previous-1") / "metrics.json").read_text() == before
    assert json.loads(folder.result.read_text())["config"]["seed"] == 1


def test_a_folder_that_cannot_be_written(tmp_path, languages):
    (tmp_path / "file").write_text("something")
    with pytest.raises(ValueError, match="out: expected a folder that can be written"):
        run_tiny(Folder(tmp_path / "file" / "run"), languages)
    assert (tmp_path / "file").read_text() == "something"


def test_nothing_to_resume(folder, languages):
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint in .* found none"):
        run_tiny(folder, languages, resume=True)


def test_resuming_with_other_settings_says_which(folder, languages):
    run_tiny(folder, languages)
    with pytest.raises(ValueError, match=r"resume: .* shots is 2, asked for is 1"):
        run_tiny(folder, languages, config(shots=1), resume=True)


def test_a_checkpoint_of_another_architecture(folder):
    small, large = config(), config(width=16)
    folder.path.mkdir()
    untrained_checkpoint(folder, large)
    with pytest.raises(ValueError, match=r"tokens.weight has shape \[256, 16\], the model's \[256, 8\]"):
        load_model(folder, small.model())
    with pytest.raises(ValueError, match=r"layers\.1.* is missing"):
        load_model(folder, config(width=16, layers=2).model())
    folder.checkpoint.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="checkpoint: expected a checkpoint of"):
        load_model(folder, small.model())


def test_training_learns(languages, folder):
    settings = config(iterations=30, width=16, outer_lr=0.02)
    trained = train(settings, languages, folder, quiet=True)
    rates = {0: settings.inner_lr, 2: settings.inner_lr}
    found = accuracy_after(trained.model, rates, settings, languages.test, 30, seed=1)
    assert abs(found[0].mean - 1 / 3) < 0.1
    assert found[2].mean > 0.8


def test_accuracy_is_the_same_for_the_same_seed_and_has_an_interval(languages):
    settings = config()
    arguments = (settings.model(), {1: 0.1}, settings, languages.test, 25)
    assert accuracy_after(*arguments, seed=3) == accuracy_after(*arguments, seed=3)
    assert accuracy_after(*arguments, seed=3)[1].tasks == 25


def test_the_baseline_keeps_its_body_under_a_new_head():
    model = config().model(classes=7)
    torch.nn.init.ones_(model.head.weight)
    fresh = with_new_head(config(), model)
    assert torch.equal(fresh.tokens.weight, model.tokens.weight)
    assert fresh.head.weight.shape == (3, 8)
    assert not fresh.head.weight.any()


def test_the_first_parameters_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = config().model().state_dict()
    torch.manual_seed(2)
    again, other = config().model().state_dict(), config(seed=1).model().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tokens.weight"], other["tokens.weight"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, languages):
    folder = Folder(tmp_path_factory.mktemp("trained") / "run")
    run_tiny(folder, languages, config(iterations=30, width=16, outer_lr=0.02))
    return folder


def test_adapt(trained, texts):
    chosen = {label: texts[label] for label in ("efgh", "mnop")}
    examples = adapt(trained, chosen, shots=4, steps=10)
    assert len(examples) == 2 * (16 - 4)
    assert sum(example.after == example.label for example in examples) > 0.9 * len(examples)
    assert all(example.text in chosen[example.label] for example in examples)
    assert {example.before for example in examples} <= set(chosen)


def test_adapt_refuses(trained, texts):
    with pytest.raises(ValueError, match="labels: expected 2 to 3, as many as the checkpoint tells apart, got 4"):
        adapt(trained, texts)
    with pytest.raises(ValueError, match="shots: expected fewer than the 16 texts of 'abcd', got 16"):
        adapt(trained, {label: texts[label] for label in ("abcd", "efgh")}, shots=16)
    with pytest.raises(ValueError, match="shots, steps: expected at least 1 and 0, got 0 and 2"):
        adapt(trained, {label: texts[label] for label in ("abcd", "efgh")}, shots=0)
    with pytest.raises(ValueError, match="checkpoint: expected a checkpoint of metafast demo or train in"):
        adapt(Folder(trained.path / "nowhere"), {"a": ["b"], "c": ["d"]})


def test_adapt_command(trained, tmp_path, capsys):
    file = tmp_path / "names.csv"
    rows = [f"{first + second},{name}" for name in ("abc", "xyz") for first in name for second in name]
    file.write_text("text,label\n" + "\n".join(rows) + "\n")
    assert main(["adapt", "--checkpoint", str(trained.path), "--file", str(file), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("before: ") == 4
    assert "accuracy on 14 texts" in out
    assert main(["adapt", "--checkpoint", str(trained.path), "--file", str(tmp_path / "none.csv")]) == 1
    assert "none.csv" in capsys.readouterr().err
    pytest.importorskip("babel", reason="Babel is not installed")
    assert main(["adapt", "--checkpoint", str(trained.path), "--languages", "ka,hy,xx"]) == 1
    assert "languages: expected codes among" in capsys.readouterr().err


def test_demo_command_refuses(tmp_path, capsys):
    assert main(["demo", "--ways", "0", "--out", str(tmp_path)]) == 1
    assert "ways: expected at least 1, got 0" in capsys.readouterr().err
    assert main(["demo", "--resume", "--out", str(tmp_path)]) == 1
    assert "resume: expected a checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", "--algorithm", "sgd"])


def untrained_checkpoint(folder, settings):
    meta = settings.learner(settings.model())
    state = {"settings": {"config": settings.to_json()}, "progress": {"iteration": 0}, "meta": meta.state_dict()}
    write_checkpoint(folder.checkpoint, state)


def untrained(folder, settings):
    """A folder as a run of no step leaves it."""
    folder.path.mkdir()
    untrained_checkpoint(folder, settings)
    folder.result.write_text("{}")


def contents(path):
    """Of a folder and what is beside it: names, bytes and when they were written."""
    files = sorted(path.parent.rglob("*"))
    return [(file, file.stat().st_mtime_ns, file.read_bytes()) for file in files if file.is_file()]


WRONG = [
    (["--ways", "0"], "ways: expected at least 1, got 0"),
    (["--ways", "4"], "ways: expected at most 3, the languages of the set test_latin, got 4"),
    (
        ["--shots", "15"],
        "shots, queries: expected at most 16 together, the fewest names of a language in the set training",
    ),
    (["--shots", "-1"], "shots: expected at least 1, got -1"),
    (["--steps", "0"], "steps: expected at least 1, got 0"),
    (["--iterations", "0"], "iterations: expected at least 1, got 0"),
    (["--seed", str(2**64)], "seed: expected a number from -2**63 to 2**64 - 1, got 18446744073709551616"),
    (["--backend", "fused"], "no extension here"),
    (["--resume", "--iterations", "7"], "resume: expected the settings of the checkpoint in"),
    (["--resume", "--ways", "4"], "resume: expected the settings of the checkpoint in"),
]


@pytest.mark.parametrize(
    ("options", "message"), WRONG, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_wrong_options_leave_an_earlier_run_alone(folder, languages, texts, monkeypatch, capsys, options, message):
    fewer = {name: texts[name] for name in list(texts)[:3]}
    languages = dataclasses.replace(languages, test_latin=fewer)
    settings = config(backend="reference", tasks=Config().tasks, queries=Config().queries)
    untrained(folder, settings)
    before = contents(folder.path)
    monkeypatch.setattr(Languages, "load", lambda: languages)
    monkeypatch.setattr("metafast.backend.extension_problem", lambda: "no extension here")
    given = {"--ways": "3", "--shots": "2", "--steps": "2", "--iterations": "6", "--backend": "reference"}
    command = [part for name, value in given.items() if name not in options for part in (name, value)]
    assert main(["demo", "--out", str(folder.path), *command, *options]) == 1
    assert message in capsys.readouterr().err
    assert contents(folder.path) == before
    assert not list(folder.path.parent.glob("*.previous-*"))


def test_a_module_that_is_missing_is_found_first(folder, languages, monkeypatch):
    untrained(folder, config())
    before = contents(folder.path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib"):
        run_tiny(folder, languages)
    assert contents(folder.path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--show", "-1"], "show: expected at least 0, got -1"),
        (["--seed", str(2**64)], "seed: expected a number from -2**63 to 2**64 - 1"),
        (["--steps", "-1"], "shots, steps: expected at least 1 and 0, got 2 and -1"),
        (["--shots", "3"], "shots: expected fewer than the 3 texts of 'a', got 3"),
    ],
)
def test_adapt_command_leaves_the_checkpoint_alone(folder, tmp_path, capsys, options, message):
    file = tmp_path / "names.csv"
    file.write_text("text,label\nab,a\nac,a\nad,a\nba,b\nbc,b\nbd,b\n")
    untrained(folder, config())
    before = contents(folder.path)
    assert main(["adapt", "--checkpoint", str(folder.path), "--file", str(file), *options]) == 1
    assert message in capsys.readouterr().err
    assert contents(folder.path) == before


def test_info_command(capsys):
    assert main(["info"]) == 0
    assert f"metafast: {metafast.__version__}" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path, languages):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="out: expected a folder that can be written"):
        run_tiny(Folder(tmp_path / "run"), languages)
