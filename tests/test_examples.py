"""The examples run, and learn something in the little time that they get here."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

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
