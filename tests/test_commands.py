"""From a file of labelled texts to predictions, on the command line."""

from __future__ import annotations

import csv
import re

import pytest

from metafast.__main__ import main
from metafast.demo.files import Folder, read_settings

LETTERS = "abcdefghij"
SMALL = ["--ways", "2", "--shots", "2", "--queries", "2", "--tasks", "2", "--width", "8", "--layers", "1"]
SMALL += ["--max-length", "6", "--iterations", "4", "--steps", "2"]


def write_csv(path, letters=LETTERS):
    """A class is a letter and the next one."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "kind"])
        for letter in letters:
            following = chr(ord(letter) + 1).upper()
            writer.writerows([letter * n + following * m, letter] for n in range(1, 4) for m in range(1, 4))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    write_csv(folder / "tasks.csv")
    assert main(["train", *columns(folder), *SMALL, "--out", str(folder / "run")]) == 0
    return folder


def columns(folder):
    return [str(folder / "tasks.csv"), "--text", "sentence", "--label", "kind"]


def test_train_evaluate_adapt(trained, tmp_path, capsys):
    run = str(trained / "run")
    assert read_settings(Folder(trained / "run"))[1] == 4
    assert main(["evaluate", *columns(trained), "--checkpoint", run, "--steps", "0", "3", "--episodes", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("accuracy on 6 tasks of classes that no training saw")
    for steps, line in zip((0, 3), lines[1:], strict=True):
        assert re.fullmatch(rf"after  {steps} steps: \d\.\d+ ± \d\.\d+", line)
    own = tmp_path / "own.csv"
    own.write_text("text,label\n" + "".join(f"{a}{b},{a}\n" for a in "xy" for b in "klmn"))
    predictions = tmp_path / "predictions.csv"
    assert main(["adapt", "--checkpoint", run, "--file", str(own), "--predictions", str(predictions)]) == 0
    assert "accuracy on 4 texts" in capsys.readouterr().out
    rows = list(csv.DictReader(predictions.read_text().split("\n")))
    assert len(rows) == 4
    assert all(row["text"][0] == row["label"] and row["after"] in ("x", "y") for row in rows)


def test_the_test_classes_are_kept(trained):
    settings = Folder(trained / "run").settings()
    assert len(settings["test"]) == 2
    assert set(settings["test"]) < set(LETTERS)


def test_resuming_a_finished_run_changes_nothing(trained, capsys):
    assert main(["train", *columns(trained), *SMALL, "--out", str(trained / "run"), "--resume"]) == 0
    assert "best accuracy on classes for validation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["train", "FILE", "--ways", "4"],
            "tasks: expected at least 12 classes, 4 ways for each of training, validation",
        ),
        (
            ["train", "FILE", "--ways", "2", "--shots", "9"],
            "shots + queries: expected at least 9 + 5 examples of every class; 'a' has 9",
        ),
        (["train", "FILE", "--ways", "0"], "ways: expected at least 1, got 0"),
        (["train", "FILE", *SMALL], "folder: expected no earlier training, got one in"),
        (["train", "nowhere.csv"], "No such file or directory: 'nowhere.csv'"),
        (
            ["evaluate", "FILE", "--checkpoint", "nowhere"],
            "checkpoint: expected a checkpoint of metafast demo or train in nowhere",
        ),
        (["evaluate", "FILE", "--episodes", "0"], "episodes: expected a positive number, got 0"),
    ],
)
def test_errors_take_one_line(command, message, trained, capsys):
    named = [*columns(trained)] if "FILE" in command else [command[1]]
    rest = command[2:]
    folder = ["--out", str(trained / "run")] if command[0] == "train" else []
    if command[0] == "evaluate" and "--checkpoint" not in rest:
        folder = ["--checkpoint", str(trained / "run")]
    assert main([command[0], *named, *folder, *rest]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
