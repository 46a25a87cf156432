"""The training loop: what it writes, that a resumed training is bitwise the same, validation, evaluation, and refusals."""

from __future__ import annotations

import json
import math
import signal
import sys
import types

import pytest
import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import metafast
from metafast.models import EncoderClassifier
from metafast.tasks import FewShot
from metafast.training import Validation, classification_loss, evaluate, fit, read_checkpoint
from metafast.training import loop as training_loop
from metafast.training.checkpoint import read_metadata, write_checkpoint

TEXTS = {name: [first + second for first in name for second in name] for name in ("abcd", "efgh", "ijkl", "mnop")}
SGD = metafast.inner.SGD(lr=0.1)


def tasks(seed=0, **options):
    return FewShot(TEXTS, **{"ways": 3, "shots": 2, "queries": 3, "seed": seed, **options})


def model(classes=3, dropout=0.0):
    torch.manual_seed(7)
    trunk = EncoderClassifier(classes, width=8, heads=2, layers=1, max_length=8)
    trunk.head = nn.Sequential(nn.Dropout(dropout), trunk.head)
    return trunk


def learner(algorithm="maml", dropout=0.0):
    options = {"loss_fn": classification_loss, "inner": SGD, "steps": 2}
    body = model(8, dropout) if algorithm.startswith("proto") else model(3, dropout)
    if algorithm == "protonet":
        return metafast.ProtoNet(body, classification_loss, ways=3)
    if algorithm == "protomaml":
        return metafast.ProtoMAML(body, ways=3, **options)
    if algorithm == "maml++":
        return metafast.MAMLPlusPlus(body, **options, multi_step_epochs=2, first_order_epochs=1)
    classes = {"maml": metafast.MAML, "reptile": metafast.Reptile, "metasgd": metafast.MetaSGD}
    return classes[algorithm](body, **options)


ALGORITHMS = ["maml", "maml++", "metasgd", "reptile", "protonet", "protomaml"]


def train(meta, folder=None, *, plateau=False, **options):
    optimizer = Adam(meta.parameters(), 0.02)
    scheduler = ReduceLROnPlateau(optimizer, patience=0) if plateau else CosineAnnealingLR(optimizer, 8)
    chosen = {"iterations": 8, "tasks_per_step": 2, "clip_norm": 1.0, "epoch_length": 3, "progress": False, **options}
    return fit(meta, tasks(), optimizer, scheduler=scheduler, folder=folder, **chosen)


def log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def interrupt_at(monkeypatch, number):
    """Ctrl-C in the middle of a step."""
    real, taken = training_loop._Run.step, []

    def step(self, *arguments):
        taken.append(1)
        if len(taken) == number:
            signal.raise_signal(signal.SIGINT)
        return real(self, *arguments)

    monkeypatch.setattr(training_loop._Run, "step", step)


@pytest.mark.parametrize(("algorithm", "plateau"), [*((algorithm, False) for algorithm in ALGORITHMS), ("maml", True)])
def test_resumed_is_bitwise_the_same(algorithm, plateau, tmp_path, monkeypatch):
    dropout = 0.0 if algorithm.startswith("proto") else 0.3
    options = {
        "plateau": plateau,
        "validation": Validation(tasks(seed=1), every=3, episodes=6, monitor="accuracy"),
        "settings": {"name": "a"},
    }
    whole, parts = learner(algorithm, dropout), learner(algorithm, dropout)
    torch.manual_seed(3)
    expected = train(whole, tmp_path / "whole", **options)
    torch.manual_seed(3)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            train(parts, tmp_path / "parts", **options)
    assert read_metadata(tmp_path / "parts" / "checkpoint.safetensors")["progress"]["iteration"] == 4
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:  # killed while it wrote a later line
        file.write('{"iteration": 5}\n{"iterat')
    torch.manual_seed(4)
    fresh = learner(algorithm, dropout)
    found = train(fresh, tmp_path / "parts", resume=True, workers=int(plateau), **options)
    assert (found.iterations, found.best, found.best_iteration) == (8, expected.best, expected.best_iteration)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    ends = [read_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts")]
    for end in ends:
        del end["progress"]["seconds"]
    assert str(ends[0]) == str(ends[1])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]) if isinstance(value, torch.Tensor) else True, name
    assert [line["iteration"] for line in log(tmp_path / "whole")] == list(range(1, 9))
    assert [line["iteration"] for line in log(tmp_path / "whole") if "validation_loss" in line] == [3, 6, 8]
    assert not list(tmp_path.rglob("*.partial"))


def test_it_learns_and_the_best_parameters_are_kept(monkeypatch):
    meta = learner()
    scores = iter([0.5, 0.9, 0.3, 0.2, 0.1])
    real = training_loop.evaluate
    states = []

    def scored(*arguments, **options):
        found = real(*arguments, **options)
        states.append({name: value.clone() for name, value in meta.state_dict().items()})
        score = torch.full_like(found.values["accuracy"][2], next(scores))
        return type(found)({**found.values, "accuracy": {2: score}})

    monkeypatch.setattr(training_loop, "evaluate", scored)
    validation = Validation(tasks(seed=1), every=2, episodes=4, monitor="accuracy", patience=3)
    found = train(meta, iterations=100, validation=validation)
    assert (found.iterations, found.best_iteration) == (10, 4)
    assert found.best == pytest.approx(0.9)
    assert all(torch.equal(value, states[1][name]) for name, value in meta.state_dict().items())


def test_training_is_a_plain_loop():
    one, other = learner(), learner()
    train(one, iterations=5)
    optimizer = Adam(other.parameters(), 0.02)
    schedule = CosineAnnealingLR(optimizer, 8)
    for support, query in tasks().batches(2, stop=10):
        optimizer.zero_grad()
        other(support, query).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluation_is_what_calls_say(algorithm):
    meta = learner(algorithm, dropout=0.5)
    state = torch.get_rng_state()
    steps = [0] if algorithm == "protonet" else [0, 1, 2]
    found = evaluate(meta, tasks(seed=2), episodes=7, steps=steps, tasks_per_batch=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert meta.training
    meta.eval()
    if algorithm == "maml++":
        meta.step_weights = None
    for count in steps:
        # Every task alone, by its own model.
        losses = []
        for support, query in tasks(seed=2).batches(1, stop=7):
            logits = meta.adapt(support, count)(query["text"])[0]
            losses.append(nn.functional.cross_entropy(logits, query["label"][0]))
        torch.testing.assert_close(
            found.values["loss"][count], torch.stack(losses).double().detach(), rtol=1e-4, atol=1e-5
        )
    accuracy = found.values["accuracy"][steps[-1]]
    interval = found.interval()
    assert interval.tasks == 7
    assert interval.mean == pytest.approx(accuracy.mean().item())
    assert interval.half_width == pytest.approx(1.96 * accuracy.std().item() / math.sqrt(7))
    assert found.to_json()["accuracy"][str(steps[-1])]["mean"] == pytest.approx(interval.mean)


def test_a_limit_of_seconds():
    assert train(learner(), iterations=10**6, seconds=0.0).iterations == 0
    found = train(learner(), iterations=10**6, seconds=0.05)
    assert found.seconds >= 0.05
    assert 1 <= found.iterations < 10**4


def test_tensorboard(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    train(learner(), tmp_path, iterations=2, tensorboard=True)
    assert written[0] == (str(tmp_path), None)
    assert [scalar[::2] for scalar in written[1:-1]] == [("loss", 1), ("accuracy", 1), ("loss", 2), ("accuracy", 2)]
    assert written[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="tensorboard: expected the package tensorboard"):
        train(learner(), tmp_path / "other", iterations=1, tensorboard=True)


def test_the_bar_and_doing_without_tqdm(monkeypatch, capsys):
    train(learner(), iterations=2, progress=True)
    shown = capsys.readouterr().err
    assert "MAML" in shown
    assert "accuracy=" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    train(learner(), iterations=2, progress=True)
    assert not capsys.readouterr().err


def test_refusals(tmp_path):
    meta, folder = learner(), tmp_path / "run"
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint in .*run, found none"):
        train(meta, folder, resume=True)
    train(meta, folder, iterations=2, settings={"shots": 2})
    with pytest.raises(ValueError, match=r"folder: expected no earlier training, got one in .*; pass resume=True"):
        train(meta, folder)
    with pytest.raises(ValueError, match=r"resume: expected the settings of .*: shots is 2, asked for is 1"):
        train(meta, folder, resume=True, settings={"shots": 1})
    train(meta, tmp_path / "nested", iterations=1, settings={"config": {"shots": 2, "ways": 3}})
    with pytest.raises(ValueError, match=r"nested: shots is 2, asked for is 1$"):
        train(meta, tmp_path / "nested", resume=True, settings={"config": {"shots": 1, "ways": 3}})
    with pytest.raises(ValueError, match="algorithm is MAML, asked for is Reptile; shots is 2, asked for is None"):
        train(learner("reptile"), folder, resume=True)
    other = metafast.MAML(model(5), classification_loss, inner=SGD)
    with pytest.raises(ValueError, match=r"head.1.weight has shape \[3, 8\], the model's \[5, 8\]; .*head.1.bias has"):
        train(other, folder, resume=True, settings={"shots": 2})
    optimizer = Adam(meta.parameters())
    with pytest.raises(ValueError, match="resume: expected a scheduler exactly where the checkpoint's training had"):
        fit(meta, tasks(), optimizer, iterations=2, tasks_per_step=2, folder=folder, resume=True, settings={"shots": 2})
    (folder / "checkpoint.safetensors").write_bytes((folder / "checkpoint.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"checkpoint: expected a checkpoint of metafast.training in .* \("):
        train(meta, folder, resume=True, settings={"shots": 2})
    with pytest.raises(ValueError, match="folder: expected one with resume or tensorboard, got None"):
        train(meta, tensorboard=True)
    with pytest.raises(ValueError, match="monitor: expected one of loss, accuracy, got 'f1'"):
        train(meta, validation=Validation(tasks(), monitor="f1", episodes=2), iterations=1)
    with pytest.raises(TypeError, match=r"tasks: expected a source of metafast.tasks, got dict"):
        fit(meta, TEXTS, optimizer, iterations=1)
    with pytest.raises(TypeError, match="meta: expected a learner of metafast, got EncoderClassifier"):
        fit(model(), tasks(), optimizer, iterations=1)
    with pytest.raises(ValueError, match="steps: expected numbers of at least 0, got"):
        evaluate(meta, tasks(), 2, steps=[-1])
    found = evaluate(meta, tasks(), 2)
    with pytest.raises(ValueError, match="name: expected one of loss, accuracy, got 'f1'"):
        found.interval("f1")
    with pytest.raises(ValueError, match="steps: expected one of 0, 2, got 1"):
        found.interval(steps=1)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {"a": torch.ones(2), "b": {1: (2, None)}, "c": [True, "x"]})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="could not be written and is as it was: No space left on device"):
        write_checkpoint(path, {"a": torch.zeros(2)})
    found = read_checkpoint(path)
    assert torch.equal(found["a"], torch.ones(2))
    assert found["b"] == {1: (2, None)}
    assert found["c"] == [True, "x"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(
        TypeError, match=r"state\.a\.0: expected tensors, numbers, strings and containers of these, got"
    ):
        write_checkpoint(path, {"a": [object()]})


def test_a_failure_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    real, taken = training_loop._Run.step, []

    def step(self, *arguments):
        taken.append(1)
        if len(taken) == 4:
            raise FloatingPointError("a loss")
        return real(self, *arguments)

    monkeypatch.setattr(training_loop._Run, "step", step)
    with pytest.raises(FloatingPointError):
        train(learner(), tmp_path, save_every=2)
    assert read_metadata(tmp_path / "checkpoint.safetensors")["progress"]["iteration"] == 2


def test_losses_of_every_kind_of_batch(generator):
    x, y = torch.randn(4, 3, generator=generator), torch.tensor([0, 1, 2, 1])
    expected = pytest.approx(-x.log_softmax(-1)[range(4), y].mean().item())
    batches = [(x, y), {"text": x, "label": y}, {"input_ids": x, "attention_mask": y, "labels": y}]
    for batch, takes_dict in zip(batches, (False, False, True), strict=True):

        def model(inputs, takes_dict=takes_dict):
            assert not takes_dict or inputs["attention_mask"] is y
            return types.SimpleNamespace(logits=inputs["input_ids"] if takes_dict else inputs)

        loss, metrics = classification_loss(model, batch)
        assert loss.item() == expected
        assert metrics["accuracy"].item() == (x.argmax(-1) == y).float().mean().item()
