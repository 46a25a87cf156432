"""The examples run, and learn something in the little time that they get here."""

from __future__ import annotations

import ast
import importlib.util
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
