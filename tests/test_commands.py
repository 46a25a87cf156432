"""From a file of labelled texts to predictions, on the command line."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import sys

import pytest
import torch

from metafast.__main__ import main
from metafast.commands import own_tasks
from metafast.commands.settings import ADAPTS, Settings
from metafast.commands.trained import Trained, read_run
from metafast.demo.files import Folder
from metafast.training import loop
from metafast.training.checkpoint import read_checkpoint

LETTERS = "abcdefghij"
SIZES = {"ways": 2, "shots": 2, "queries": 2, "tasks": 2, "max_length": 6, "iterations": 2, "steps": 2}
OF_BYTES = {**SIZES, "width": 8, "heads": 2, "layers": 1}


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    """Validation and test of a few tasks."""
    few = own_tasks.Effort(2, 2, 4)
    monkeypatch.setattr(own_tasks, "OF_BYTES", few)
    monkeypatch.setattr(own_tasks, "OF_PRETRAINED", few)


def flags(settings):
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def write_csv(path, letters=LETTERS, names=("text", "label")):
    """A class is a letter and the next one."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for letter in letters:
            following = chr(ord(letter) + 1).upper()
            writer.writerows([letter * n + following * m, letter] for n in range(1, 4) for m in range(1, 4))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("tasks") / "tasks.csv")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Three classes of six texts."""
    path = tmp_path_factory.mktemp("own") / "own.csv"
    path.write_text("text,label\n" + "".join(f"{a}{b},{a}\n" for a in "xyz" for b in "klmnop"))
    return path


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path / "run")


def train(tasks, run, settings=None, *options):
    return main(["train", str(tasks), "--out", str(run.path), *flags(OF_BYTES | (settings or {})), *options])


def parameters(folder):
    return read_checkpoint(folder.checkpoint)["meta"]


def predictions_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def check_evaluate_and_adapt(tasks, own, run, tmp_path, capsys):
    """Both commands on a run; the rows of predictions."""
    capsys.readouterr()
    assert main(["evaluate", str(tasks), "--checkpoint", str(run.path), "--episodes", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "accuracy on 3 tasks of classes that no training saw, mean ± 95 % interval"
    steps = read_run(run).settings.algorithm != "protonet"
    assert len(lines) == 2 + steps
    assert all(re.fullmatch(r"after +\d steps: \d\.\d+ ± \d\.\d+", line) for line in lines[1:])
    predictions = tmp_path / "predictions.csv"
    command = ["adapt", "--checkpoint", str(run.path), "--file", str(own), "--predictions", str(predictions)]
    assert main(command) == 0
    assert "accuracy on 12 texts" in capsys.readouterr().out
    rows = predictions_of(predictions)
    assert len(rows) == 12
    assert all(row["text"][0] == row["label"] and {row["before"], row["after"]} <= set("xyz") for row in rows)
    return rows


@pytest.mark.parametrize("algorithm", ADAPTS)
def test_train_evaluate_adapt(algorithm, tasks, own, run, tmp_path, capsys):
    assert train(tasks, run, {"algorithm": algorithm, "ways": 3}) == 0
    found = read_run(run)
    assert found.iteration == 2
    assert found.settings.algorithm == algorithm
    check_evaluate_and_adapt(tasks, own, run, tmp_path, capsys)


@pytest.mark.parametrize("algorithm", ["maml", "metasgd"])
def test_a_head_alone_is_adapted(algorithm, tasks, run):
    assert train(tasks, run, {"algorithm": algorithm, "adapt": "head"}) == 0
    meta = Trained.read(run).learner(2)
    support = {"text": torch.randint(1, 99, (1, 4, 6)), "label": torch.tensor([[0, 0, 1, 1]])}
    assert set(meta.adapt(support).params) == {"head.weight", "head.bias"}


def test_learned_rates_and_the_best_parameters_come_back(tasks, run):
    assert train(tasks, run, {"algorithm": "maml++", "outer_lr": 0.05}) == 0
    state = read_checkpoint(run.checkpoint)["best"]
    meta = Trained.read(run).learner(2)
    for name, value in meta.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(value, state[name]), name
    assert (state["rates.lr"] != 0.1).any()


def test_prototypes_tell_more_classes_apart_than_in_training(tasks, own, run, capsys):
    for algorithm in ("protonet", "maml"):
        folder = Folder(run.path / algorithm)
        assert train(tasks, folder, {"algorithm": algorithm}) == 0
        capsys.readouterr()
        status = main(["adapt", "--checkpoint", str(folder.path), "--file", str(own)])
        assert status == (0 if algorithm == "protonet" else 1)
    assert "labels: expected 2 to 2, as many as the checkpoint tells apart, got 3" in capsys.readouterr().err


def test_what_is_learned_is_predicted(run, tmp_path):
    """Classes of letters of their own, which prototypes tell apart."""
    own = tmp_path / "own.csv"
    own.write_text("text,label\n" + "".join(f"{a * n},{a}\n" for a in "xyz" for n in range(2, 7)))
    training = tmp_path / "training.csv"
    training.write_text("text,label\n" + "".join(f"{a * n},{a}\n" for a in LETTERS for n in range(2, 7)))
    assert train(training, run, {"algorithm": "protonet", "iterations": 20, "outer_lr": 0.01}) == 0
    predictions = tmp_path / "predictions.csv"
    assert main(["adapt", "--checkpoint", str(run.path), "--file", str(own), "--predictions", str(predictions)]) == 0
    assert all(row["after"] == row["label"] for row in predictions_of(predictions))


def test_the_test_classes_are_kept_and_columns_remembered(run, tmp_path, capsys):
    named = write_csv(tmp_path / "named.csv", names=("sentence", "kind"))
    assert train(named, run, {"text": "sentence", "label": "kind"}) == 0
    assert len(read_run(run).test) == 2
    assert set(read_run(run).test) < set(LETTERS)
    assert main(["evaluate", str(named), "--checkpoint", str(run.path), "--steps", "0", "3"]) == 0
    out = capsys.readouterr().out
    assert "accuracy on 4 tasks" in out
    assert "after  3 steps: " in out


# Settings.


def test_a_file_of_settings(tasks, run, tmp_path):
    file = tmp_path / "settings.toml"
    lines = [
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}" for name, value in OF_BYTES.items()
    ]
    file.write_text("\n".join([*lines, 'algorithm = "anil"', "inner_lr = 1", f'out = "{run.path}"']))
    assert main(["train", str(tasks), "--config", str(file), "--shots", "3", "--outer-lr", "0.5"]) == 0
    expected = Settings.of({**OF_BYTES, "algorithm": "anil", "inner_lr": 1, "shots": 3, "outer_lr": 0.5})
    assert read_run(run).settings == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("shotz = 5", "settings.toml: shotz: expected a setting among model, algorithm"),
        ("shots = '5'", "settings.toml: shots: expected a whole number, got '5'"),
        ("shots = true", "settings.toml: shots: expected a whole number, got True"),
        ("inner_lr = '5'", "settings.toml: inner_lr: expected a number, got '5'"),
        ("model = 5", "settings.toml: model: expected a string, got 5"),
        ("shots = 0", "settings.toml: shots: expected at least 1, got 0"),
        ("algorithm = 'sgd'", "settings.toml: algorithm: expected one of maml, fomaml, reptile, anil, metasgd"),
        ("shots = 1\nways =\n", "settings.toml: expected TOML (Invalid value (at line 2, column 7))"),
    ],
)
def test_errors_of_a_file_of_settings(line, message, tasks, run, tmp_path, capsys):
    (tmp_path / "settings.toml").write_text(line)
    assert main(["train", str(tasks), "--out", str(run.path), "--config", str(tmp_path / "settings.toml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("metafast train: ")
    assert message in error
    assert error.count("\n") == 1
    assert not run.path.exists()


def test_settings_that_suit():
    assert Settings.of({}) == Settings()
    assert Settings.of({"algorithm": "anil"}).adapt == "head"
    assert Settings.of({"model": "x"}).adapt == "head"
    assert Settings.of({"model": "x", "algorithm": "reptile"}).adapt == "all"
    assert Settings.of({"model": "x", "adapt": "all", "ways": 3}).ways == 3
    assert Settings.from_json(json.loads(json.dumps(Settings(algorithm="protonet", adapt="none").to_json()))).ways == 5
    with pytest.raises(ValueError, match="settings: expected the settings"):
        Settings.from_json({"ways": 5})
    with pytest.raises(TypeError, match="ways: expected a whole number, got 'five'"):
        Settings(ways="five")


# Going on.


def interrupt_after(monkeypatch, steps):
    """Ctrl-C in the middle of a step."""
    real, taken = loop._Run.step, []

    def step(*args):
        taken.append(1)
        if len(taken) == steps:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loop._Run, "step", step)


@pytest.mark.parametrize("algorithm", ["maml++", "protonet"])
def test_interrupted_and_resumed_is_the_same_run(algorithm, tasks, tmp_path, monkeypatch, capsys):
    whole, parts = Folder(tmp_path / "whole"), Folder(tmp_path / "parts")
    settings = {"algorithm": algorithm, "iterations": 6}
    assert train(tasks, whole, settings) == 0
    with monkeypatch.context() as patched:
        interrupt_after(patched, 4)
        assert train(tasks, parts, settings) == 130
    assert read_run(parts).iteration == 4
    again = re.search(r"go on with: python -m metafast (.*)", capsys.readouterr().err)
    assert again
    assert main(again[1].split()) == 0
    expected = parameters(whole)
    for name, value in parameters(parts).items():
        assert name == "_extra_state" or torch.equal(value, expected[name]), name


def test_resuming_with_other_settings_says_which(tasks, run, capsys):
    assert train(tasks, run) == 0
    assert train(tasks, run, None, "--resume") == 0
    capsys.readouterr()
    assert train(tasks, run, {"shots": 1}, "--resume") == 1
    assert "resume: expected the settings of the checkpoint in" in (error := capsys.readouterr().err)
    assert "shots is 2, asked for is 1" in error


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 4}, "tasks: expected at least 12 classes, 4 ways for each of training, validation"),
        ({"shots": 9}, "shots + queries: expected at least 9 + 2 examples of every class; 'a' has 9"),
        ({"ways": 0}, "ways: expected at least 1, got 0"),
        ({"algorithm": "sgd"}, "algorithm: expected one of maml, fomaml, reptile, anil, metasgd, maml++, protonet"),
        ({"algorithm": "anil", "adapt": "all"}, "adapt: expected head with anil, got 'all'"),
        ({"inner_lr": 0.0}, "inner_lr: expected a number above 0, got 0.0"),
        ({"trained_layers": 2}, "trained_layers: expected no such setting with the model bytes, got 2"),
        ({"width": 9}, "width: expected a multiple of heads = 2, got 9"),
        ({"seed": 2**64}, "seed: expected a number from -2**63 to 2**64 - 1"),
        ({"label": "kind"}, "expected columns text and kind; kind missing"),
    ],
)
def test_wrong_options_of_train_take_one_line(options, message, tasks, run, capsys):
    assert train(tasks, run, options) == 1
    error = capsys.readouterr().err
    assert error.startswith("metafast train: ")
    assert message in error
    assert error.count("\n") == 1
    assert not run.path.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.csv", None, "No such file or directory"),
        ("broken.csv", 'text,label\nab,a\n"ac,a\n', "broken.csv, line 3: expected CSV (unexpected end of data)"),
        ("short.csv", "text,label\nab,a\nac", "short.csv, line 3: expected a label, got None"),
        ("broken.jsonl", '{"text": "ab", "label": "a"}\n{"text": "a', "broken.jsonl, line 2: expected a JSON object"),
        ("broken.json", '{"a": ["ab",\n"ac"', "broken.json, line 2: expected JSON"),
        ("empty.csv", "", "expected columns text and label; text and label missing, found none"),
    ],
)
def test_a_file_that_cannot_be_read_takes_one_line(name, content, message, run, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert train(tmp_path / name, run) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not run.path.exists()


def test_a_folder_that_is_in_use_or_cannot_be_written(tasks, run, tmp_path, capsys):
    (tmp_path / "file").write_text("something")
    assert train(tasks, Folder(tmp_path / "file" / "run")) == 1
    assert "metafast train: out: expected a folder that can be written, got" in capsys.readouterr().err
    assert train(tasks, run, None, "--resume") == 1
    assert "resume: expected a checkpoint in" in capsys.readouterr().err
    assert train(tasks, run) == 0
    capsys.readouterr()
    assert train(tasks, run) == 1
    assert "out: expected a folder without a training, got one in" in capsys.readouterr().err


def test_a_full_disk_takes_one_line(tasks, run, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metafast.training.checkpoint.os.fsync", full)
    assert train(tasks, run) == 1
    error = capsys.readouterr().err
    assert "could not be written and is as it was: No space left on device" in error
    assert error.count("\n") == 1
    assert not list(run.path.glob("*.partial"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["evaluate", "TASKS", "--checkpoint", "nowhere"],
            "checkpoint: expected a checkpoint of metafast train in nowhere",
        ),
        (
            ["evaluate", "TASKS", "--checkpoint", "RUN", "--episodes", "0"],
            "episodes: expected a positive number, got 0",
        ),
        (
            ["evaluate", "TASKS", "--checkpoint", "RUN", "--steps", "1"],
            "steps: ProtoNet takes none, expected None or 0",
        ),
        (["evaluate", "OWN", "--checkpoint", "RUN"], "classes: expected labels among x, y, z; got"),
        (
            ["adapt", "--file", "OWN", "--checkpoint", "nowhere"],
            "checkpoint: expected a checkpoint of metafast demo or",
        ),
        (
            ["adapt", "--file", "OWN", "--checkpoint", "RUN", "--shots", "6"],
            "shots: expected fewer than the 6 texts of",
        ),
        (["adapt", "--file", "OWN", "--checkpoint", "RUN", "--predictions", "RUN"], "could not be written"),
    ],
)
def test_wrong_options_of_evaluate_and_adapt_take_one_line(command, message, tasks, own, run, capsys):
    assert train(tasks, run, {"algorithm": "protonet"}) == 0
    capsys.readouterr()
    names = {"TASKS": str(tasks), "OWN": str(own), "RUN": str(run.path)}
    assert main([names.get(part, part) for part in command]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"metafast {command[0]}: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "evaluate", "adapt"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m metafast {command} " in out
    assert "text,label\n" in out


# Models of Hugging Face.

PRETRAINED = {**SIZES, "max_length": 16}
from_transformers = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers"
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder of a BERT with random weights and a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(n) for n in range(97, 123))]
    pieces += [f"##{chr(n)}" for n in range(97, 123)]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    config = transformers.BertConfig(
        vocab_size=len(pieces),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def train_bert(tasks, run, bert, settings):
    command = ["train", str(tasks), "--out", str(run.path), "--model", str(bert)]
    return main([*command, *flags(PRETRAINED | settings)])


@from_transformers
@pytest.mark.parametrize(
    "settings",
    [{"algorithm": "maml"}, {"algorithm": "protonet"}, {"algorithm": "reptile", "trained_layers": 9}],
    ids=lambda settings: settings["algorithm"],
)
def test_a_model_of_hugging_face(settings, tasks, own, run, bert, tmp_path, capsys):
    given = tmp_path / "given"
    shutil.copytree(bert, given)
    assert train_bert(tasks, run, given, {**settings, "ways": 3}) == 0
    # The run's folder has all that the other commands need.
    shutil.rmtree(given)
    check_evaluate_and_adapt(tasks, own, run, tmp_path, capsys)


@from_transformers
def test_the_last_layers_train(tasks, run, bert):
    from safetensors.torch import load_file

    assert train_bert(tasks, run, bert, {"algorithm": "protonet", "trained_layers": 1, "outer_lr": 0.1}) == 0
    before, after = load_file(bert / "model.safetensors"), parameters(run)
    changed = {name for name, value in before.items() if not torch.equal(value, after[f"model.encoder.{name}"])}
    assert changed
    assert all(name.startswith("encoder.layer.1.") for name in changed)


@from_transformers
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": "/nowhere/model"},
            "model: expected 'bytes', the folder of a Hugging Face model or a name on the hub",
        ),
        ({"model": "EMPTY"}, "model: expected a folder with config.json, got"),
        ({"model": "CUT"}, "model: expected a Hugging Face model with its tokenizer in"),
        ({"model": "OTHER"}, "model: expected all weights in"),
        ({"width": 8}, "width: expected no such setting with the model a Hugging Face model, got 8"),
        ({"max_length": 33}, "max_length: expected at most 32, the tokens of the model, got 33"),
        ({"algorithm": "protonet", "trained_layers": 0}, "trained_layers: expected at least 1 with protonet, got 0"),
    ],
)
def test_wrong_models_take_one_line(settings, message, tasks, run, bert, tmp_path, capsys):
    folders = {"EMPTY": tmp_path / "empty", "CUT": tmp_path / "cut", "OTHER": tmp_path / "other"}
    folders["EMPTY"].mkdir()
    for name in ("CUT", "OTHER"):
        shutil.copytree(bert, folders[name])
    weights = (bert / "model.safetensors").read_bytes()
    (folders["CUT"] / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    from safetensors.torch import load_file, save_file

    kept = {name: value for name, value in load_file(bert / "model.safetensors").items() if "layer.1" not in name}
    save_file(kept, folders["OTHER"] / "model.safetensors", metadata={"format": "pt"})
    model = settings.get("model", str(bert))
    others = {name: value for name, value in settings.items() if name != "model"}
    assert train_bert(tasks, run, folders.get(model, model), others) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not run.path.exists()


@from_transformers
def test_transformers_is_missing(tasks, run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert train_bert(tasks, run, "somewhere", {}) == 1
    assert "expected transformers >= 4.53" in capsys.readouterr().err
