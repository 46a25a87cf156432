"""The examples of applications, on small data that is made here."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from metafast.tasks import cldr

EXAMPLES = Path(__file__).parent.parent / "examples"
LANGUAGES = ("indonesian", "english", "javanese", "sundanese", "ngaju", "acehnese", "buginese", "toba_batak")
PARTS = ("train", "valid", "test")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Runs an example with small sizes; its printed lines."""
    pytest.importorskip("transformers")
    pytest.importorskip("babel")
    pytest.importorskip("safetensors")

    def run(name, *options, **sizes):
        found = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        for size, value in sizes.items():
            assert size in found
            monkeypatch.setitem(found["main"].__globals__, size, value)
        figure = tmp_path / "figure.png"
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, "--folder", str(tmp_path), "--figure", str(figure), *options])
        found["main"]()
        assert figure.stat().st_size > 1000
        return capsys.readouterr().out.splitlines()

    return run


def sentence(generator, words=5):
    letters = torch.randint(97, 117, (words, 4), generator=generator).tolist()
    return " ".join(bytes(word).decode() for word in letters)


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def nusax_sentiment(folder, generator):
    """The first word says the sentiment, in every language."""
    for language in LANGUAGES:
        for part in PARTS:
            rows = [(n, f"{label} {sentence(generator)}", label) for n in range(20) for label in ("bad", "good", "so")]
            write(folder / "nusax_sentiment" / language / f"{part}.csv", ("id", "text", "label"), rows)


def nusax_translation(folder, generator):
    """A language adds its own ending to every word."""
    for part in PARTS:
        sentences = [sentence(generator, 3) for _ in range(40)]
        rows = [
            [n, text, *(text.replace(" ", f"{number} ") for number in range(1, len(LANGUAGES)))]
            for n, text in enumerate(sentences)
        ]
        write(folder / "nusax_mt" / f"{part}.csv", ("", *LANGUAGES), rows)


def persona_chat(folder, generator):
    """Every person has a word of their own."""
    for part in ("valid", "test"):
        rows = []
        for _ in range(12):
            first, second = sentence(generator, 1), sentence(generator, 1)
            turns = [f"User {1 + n % 2}: i like {(first, second)[n % 2]} {n}" for n in range(18)]
            rows.append(["", "", "\n".join(turns)])
        write(folder / "persona_chat" / f"{part}.csv", ("a", "b", "Best Generated Conversation"), rows)


def clinc150(folder, generator):
    domains = {name: [f"{name}{n}" for n in range(count)] for name, count in DOMAINS.items()}
    words = {intent: sentence(generator, 1) for of_domain in domains.values() for intent in of_domain}
    rows = [[f"{sentence(generator, 2)} {word}", intent] for intent, word in words.items() for _ in range(14)]
    (folder / "clinc150").mkdir()
    (folder / "clinc150" / "domains.json").write_text(json.dumps(domains))
    (folder / "clinc150" / "data_full.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))


DOMAINS = {"banking": 3, "travel": 3, "work": 5, "home": 7}


def numbers(line):
    return [
        float(word.strip("%")) for word in line.replace("±", " ").split() if word.strip("%-").replace(".", "").isdigit()
    ]


def test_personalised_dialogue(example, tmp_path, generator):
    persona_chat(tmp_path, generator)
    counts = ["--turns", "4", "--joint", "20", "--more", "5", "--meta", "3", "--people", "8", "--no-capture"]
    lines = example("personalised_dialogue", *counts, WIDTH=32, LAYERS=1, PIECES=280, LENGTH=24)
    rows = {line[:14].strip(): numbers(line[14:]) for line in lines[3:6]}
    assert list(rows) == ["one for all", "fine-tuned", "MAML"]
    for before, after, other, falls, own, *_ in rows.values():
        assert before > 1
        assert after <= before * 1.5
        assert other > 1
        assert 0 <= falls <= 100
        assert 0 <= own <= 100
    assert rows["one for all"][0] == rows["fine-tuned"][0]


def test_cross_lingual_transfer(example, tmp_path, generator):
    nusax_sentiment(tmp_path, generator)
    counts = ["--joint", "10", "--more", "2", "--meta", "2", "--episodes", "3", "--no-capture"]
    sizes = {
        "WIDTH": 16,
        "PIECES": 300,
        "LENGTH": 16,
        "META_SHOTS": 16,
        "RATES": (0.1, 1.0),
        "MORE_STEPS": (1, 2),
        "VALIDATION_SENTENCES": 20,
        "TEST_SENTENCES": 40,
    }
    lines = example("cross_lingual_transfer", *counts, **sizes)
    rows = {line[:20].strip(): numbers(line[20:]) for line in lines[3:5]}
    assert list(rows) == ["joint, fine-tuned", "MAML"]
    assert all(0 <= value <= 1 for row in rows.values() for value in row[:6])
    # Iterations: shared ones, and those of each row.
    assert [row[6] for row in rows.values()] == [12, 12]


def test_multi_task_learning(example, tmp_path, generator, monkeypatch):
    few = cldr.Split(training=("de", "fr", "ja", "ru"), validation=("it", "el", "pl"), test=("ka", "hy", "eo"))
    monkeypatch.setattr(cldr, "split", lambda: few)
    nusax_sentiment(tmp_path, generator)
    clinc150(tmp_path, generator)
    counts = ["--meta", "6", "--joint", "3", "--episodes", "4", "--no-capture"]
    sizes = {"WIDTH": 16, "PIECES": 300, "LENGTH": 8, "WAYS": 3, "SHOTS": 2, "QUERIES": 2, "RATES": (1.0,)}
    lines = example("multi_task_learning", *counts, **sizes)
    assert lines[0].split() == ["intents", "languages", "sentiment", "iterations", "seconds"]
    assert [line[:20].strip() for line in lines[1:4]] == ["MAML, together", "MAML, one each", "joint, fine-tuned"]
    assert all(0 <= value <= 1 for line in lines[1:4] for value in numbers(line[20:])[:6])


def test_low_resource_translation(example, tmp_path, generator):
    pytest.importorskip("sacrebleu")
    nusax_translation(tmp_path, generator)
    counts = ["--joint", "4", "--more", "2", "--meta", "2", "--sentences", "4", "--no-capture"]
    sizes = {"WIDTH": 16, "LAYERS": 1, "BATCH": 4, "PAIRS": (4, 8), "META_SHOTS": 4, "VALIDATION_SENTENCES": 2}
    sizes |= {"WAYS": [("SGD 0.1", 1)], "FROM_SCRATCH": [("Adam 0.001", 2)]}
    lines = example("low_resource_translation", *counts, **sizes)
    assert lines[0] == "2 languages train, unseen: acehnese, buginese, toba_batak"
    assert [line[:16].strip() for line in lines[3:7]] == ["source as it is", "from scratch", "fine-tuned", "MAML"]
    assert all(0 <= value <= 100 for line in lines[4:7] for value in numbers(line[16:])[:6])


def test_huggingface_models(example, tmp_path, generator):
    clinc150(tmp_path, generator)
    persona_chat(tmp_path, generator)
    names = ["BERT", "RoBERTa", "GPT-2"]
    counts = ["--models", *names, "--iterations", "1", "--episodes", "2", "--rounds", "1", "--no-capture"]
    # A fresh process would have the sizes of the file.
    sizes = {"WIDTH": 16, "LAYERS": 1, "HEADS": 2, "PIECES": 300, "TASKS": 2, "WAYS": 3, "LENGTH": 8}
    lines = example("huggingface_models", *counts, **sizes, in_a_fresh_process=lambda name, what, folder: 2**20)
    assert [line.split()[0] for line in lines[1:4]] == names
    assert [line.split()[0] for line in lines[6:9]] == names
    assert all(float(line.split()[1]) < 1e-8 for line in lines[6:9])


def test_huggingface_models_measure_memory_in_a_process(tmp_path, generator):
    clinc150(tmp_path, generator)
    found = runpy.run_path(str(EXAMPLES / "huggingface_models.py"))
    assert found["in_a_fresh_process"]("BERT", "metafast", tmp_path) > 2**20
