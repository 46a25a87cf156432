"""The examples run, and learn something in the little time that they get here."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_sinusoid_prints_the_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sinusoid.py", "--iterations", "3"])
    runpy.run_path(str(EXAMPLES / "sinusoid.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "±" in line] == [
        [algorithm, shots] for algorithm in ("MAML", "Meta-SGD") for shots in ("5", "10", "20")
    ]


def test_sinusoid_learns():
    example = runpy.run_path(str(EXAMPLES / "sinusoid.py"))

    def error(meta):
        mean, half = example["evaluate"](meta, 10, torch.Generator().manual_seed(1))
        assert half > 0
        return mean

    torch.manual_seed(0)
    meta = example["learner"]("Meta-SGD")
    before = error(meta)
    example["train"](meta, 200, 4, 1e-2, torch.Generator().manual_seed(0))
    assert error(meta) < 0.8 * before


def run(folder, *command):
    """The output of Python with these arguments."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # which torchrun passes on
        process.communicate()
        raise
    assert process.returncode == 0, output + errors
    return output


def torchrun(folder, processes, script, *options):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return run(folder, *launcher, str(EXAMPLES / script), *options)


def test_distributed_trains_the_same_sharded_and_resumes(tmp_path):
    options = ["--iterations", "3", "--tasks", "4"]
    found = torchrun(tmp_path, 2, "distributed.py", *options)
    assert re.fullmatch(r"2 processes, mean squared error after one step: \d+\.\d+\n", found)
    assert found == torchrun(tmp_path, 2, "distributed.py", *options, "--shard", "--checkpoint", "state")
    assert torchrun(tmp_path, 1, "distributed.py", *options, "--checkpoint", "state").startswith("1 processes")


@pytest.mark.parametrize("package", ["accelerate", "lightning"])
def test_distributed_through_other_packages(package, tmp_path):
    # Not imported here, where its warnings would be errors.
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it comes with the extra 'distributed'")
    if package == "accelerate":
        found = torchrun(tmp_path, 2, "distributed_accelerate.py", "3")
    else:
        found = run(tmp_path, str(EXAMPLES / "distributed_lightning.py"), "3")
    assert "2 processes" in found


@pytest.mark.parametrize("package", ["accelerate", "lightning"])
def test_they_take_at_most_20_lines(package):
    text = (EXAMPLES / f"distributed_{package}.py").read_text()
    first = ast.parse(text).body[1].lineno  # after the docstring
    assert sum(bool(line.strip()) for line in text.splitlines()[first - 1 :]) <= 20


@pytest.fixture
def lora():
    """The example, with transformers and peft; their own deprecations are not ours to fix."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    pytest.importorskip("babel")
    return runpy.run_path(str(EXAMPLES / "lora.py"))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers")
def test_lora_prints_the_table(lora, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora.py", "--pretraining", "2", "--iterations", "1"])
    monkeypatch.setitem(lora["main"].__globals__, "TASKS", 4)
    lora["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4421 of 94026 parameters are adapted")
    assert [line.rsplit(maxsplit=3)[0] for line in lines[2:4]] == ["a new adapter", "meta-trained by MAML"]


@pytest.mark.usefixtures("fused_cpu")
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers")
def test_lora_learns(lora):
    lora["metafast"].integrations.huggingface.register()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = lora["with_adapter"](lora["pretrained"](100, generator))
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    meta = lora["learner"](model)
    test = lora["episodes"](lora["cldr"].split().test, 1)

    def loss():
        return lora["evaluate"](meta, test, 20, steps=[3]).interval("loss").mean

    before = loss()
    lora["train"](meta, 20, 0)
    assert loss() < before - 0.02
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if not p.requires_grad)


@pytest.fixture
def few_shot(monkeypatch):
    """The example; transformers' own deprecations are not ours to fix."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    example = runpy.run_path(str(EXAMPLES / "few_shot_classification.py"))
    monkeypatch.setitem(example["main"].__globals__, "WIDTH", 16)
    return example


def intents(folder, generator):
    """Data laid out as CLINC150: what an intent is about is a word that its sentences share."""
    domains = {name: [f"{name}{n}" for n in range(count)] for name, count in DOMAINS.items()}
    pool = ["please", "now", "can you", "i want", "tell me", "my", "the", "for today", "again", "quickly"]
    rows = []
    for number, intent in enumerate(intent for of in domains.values() for intent in of):
        word = "".join(chr(ord("a") + (number * 7 + 3 * n) % 26) for n in range(5))
        for n in range(16):
            first, second = (pool[k] for k in torch.randperm(len(pool), generator=generator)[:2].tolist())
            rows.append([f"{first} {word} {second} {n}", intent])
    (folder / "clinc150").mkdir()
    (folder / "clinc150" / "domains.json").write_text(json.dumps(domains))
    (folder / "clinc150" / "data_full.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))


DOMAINS = {"banking": 2, "travel": 2, "work": 3, "home": 6}


def test_few_shot_classification_prints_the_table(few_shot, tmp_path, generator, monkeypatch, capsys):
    intents(tmp_path, generator)
    names = ["MAML", "MAML++", "ProtoNet", "pretrain, fine-tune"]
    options = ["--folder", str(tmp_path), "--encoders", "scratch", "--ways", "3", "--shots", "2", "--no-capture"]
    options += ["--iterations", "2", "--episodes", "4", "--validation-episodes", "4", "--algorithms", *names]
    options += ["--figure", str(tmp_path / "figure.png")]
    monkeypatch.setattr(sys, "argv", ["few_shot_classification.py", *options])
    few_shot["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "clinc150, 3 ways: 6, 3, 4 classes"
    assert [line[:22].strip() for line in lines if "±" in line] == names
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert all(line.split()[-1].isdigit() for line in lines if "±" in line)


def test_few_shot_classification_with_sentence_vectors(few_shot, generator):
    options = {"ways": 3, "shots": 1, "iterations": 40, "seed": 0, "episodes": 20, "validation_episodes": 10}
    options = argparse.Namespace(**options, progress=False, capture=False)
    centres = torch.randn(9, 8, generator=generator)
    examples = {
        str(n): list(centre + 0.3 * torch.randn(10, 8, generator=generator)) for n, centre in enumerate(centres)
    }
    labels = list(examples)
    parts = [{label: examples[label] for label in labels[n : n + 3]} for n in (0, 3, 6)]
    rates = {"inner_lr": 1.0, "outer_lr": 1e-3, "iterations": 40, "joint_iterations": 40}
    setting = few_shot["Setting"](parts, lambda classes: few_shot["Refined"](classes, 8), **rates)
    found = few_shot["row"]("MAML", setting, options)
    assert found.after.mean > found.before.mean + 0.2
    for name in set(few_shot["ALGORITHMS"]) - {"pretrain, fine-tune"}:
        meta = few_shot["learner"](name, setting, 3, capture=False)
        meta(*next(setting.tasks(0, options).batches(2))).backward()


def test_few_shot_classification_computes_vectors_once(few_shot, generator):
    calls = []

    class Embedding(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            calls.append(len(input_ids))
            return input_ids.float()

    def tokenizer(texts, **options):
        ids = torch.tensor([[len(text), ord(text[0])] for text in texts])
        return {"input_ids": ids, "attention_mask": ids}

    found = few_shot["vectors_of"]({"a": ["xyz", "z"], "b": ["z"]}, Embedding(), tokenizer)
    assert calls == [2]
    assert [vector.tolist() for vector in found["a"]] == [[3, 120], [1, 122]]
    assert [vector.tolist() for vector in found["b"]] == [[1, 122]]
