"""Sources of tasks: what they read, what they draw, that workers change nothing, and what they refuse."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, TensorDataset

from metafast.tasks import Episode, Examples, FewShot, Mixture, Tasks, read_examples, size_shares, split
from metafast.tasks.corpora import clinc150, huffpost

TEXTS = {label: [label * (1 + n % 7) + str(n) for n in range(12)] for label in "abcdefg"}


def equal(one, other):
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# Reading.


@pytest.mark.parametrize("layout", ["csv", "tsv", "json", "rows.json", "lines.json", "jsonl", "clinc.json", "dict"])
def test_every_layout_reads_the_same(layout, tmp_path):
    expected = {"x": ["a\u2028b", 'say "c", d'], "y": ["e\x85f"]}
    rows = [(text, label) for label, texts in expected.items() for text in texts]
    objects = [{"text": text, "label": label, "id": 3} for text, label in rows]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in objects)
    quoted = ["text{}label", *('"{}"{{}}{}'.format(text.replace('"', '""'), label) for text, label in rows)]
    clinc = {"train": rows[:1], "val": rows[1:2], "test": rows[2:], "oos_test": [["what", "oos"]]}
    content = {
        "csv": "\n".join(quoted).format(*[","] * 4),
        "tsv": "\r\n".join(line.format("\t") for line in quoted) + "\r\n",
        "json": json.dumps(expected, ensure_ascii=False),
        "rows.json": json.dumps(objects),
        "lines.json": lines,
        "jsonl": lines + "\n\n",
        "clinc.json": json.dumps(clinc),
        "dict": "",
    }
    if layout == "csv":
        content["csv"] = "\n".join(line.format(",") for line in quoted)
    path = tmp_path / f"data.{layout}"
    path.write_bytes(content[layout].encode())
    found = read_examples(expected if layout == "dict" else path)
    assert {label: list(texts) for label, texts in found.items()} == expected


class Column(list):
    names = None


class HuggingFaceLike:
    """What ``datasets.Dataset`` has of what is used."""

    column_names = ("sentence", "kind")

    def __init__(self):
        kind = type("ClassLabel", (), {"names": ["good", "bad"]})()
        self.features = {"sentence": None, "kind": kind}

    def __getitem__(self, column):
        return {"sentence": ["a", "b", "c"], "kind": [0, 1, 0]}[column]


def test_datasets_of_others():
    found = read_examples(HuggingFaceLike(), text="sentence", label="kind")
    assert dict(found) == {"good": ["a", "c"], "bad": ["b"]}
    x, y = torch.randn(6, 3), torch.tensor([1, 0, 1, 0, 1, 1])
    pairs = read_examples(TensorDataset(x, y))
    assert torch.equal(torch.stack(list(pairs["1"])), x[y == 1])
    both = type("DatasetDict", (), {"column_names": {"train": [], "test": []}})()
    with pytest.raises(TypeError, match=r"one of the splits train, test, got all; pass dataset\['train'\]"):
        read_examples(both)
    with pytest.raises(TypeError, match=r"examples: expected a mapping from label to examples, a path, .* got int"):
        read_examples(3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"text,kind\na,b\n",
            "a.csv: expected columns text and label; label missing, found text, kind; text=",
        ),
        ("a.csv", b"", "text and label missing, found none"),
        ("a.csv", b"text,label\na,b\n ,b\n", "a.csv, line 3: expected a text, got ' '; remove the row or fill it in"),
        ("a.csv", b"text,label\na\n", "a.csv, line 2: expected a label, got None"),
        ("a.csv", b"text,label\na,b,c\n", "a.csv, line 2: expected 2 columns, got 3"),
        ("a.csv", b'text,label\n"a,b\nc,d\n', "a.csv, line 2: expected CSV"),
        ("a.csv", b'text,"label\na,b\n', "a.csv, line 1: expected CSV"),
        ("a.csv", b"text,label\n", "a.csv: expected at least one row, got none"),
        ("a.csv", b"text,label\na,b\n\xff,b\n", "a.csv, line 3: expected UTF-8, got the byte 0xff"),
        ("a.json", b'{"a": ["b",\n "c"', "a.json, line 2: expected JSON"),
        ("a.json", b'{"text": "a", "label": "b"}\n{"text": "a', "a.json, line 2: expected a JSON object"),
        ("a.json", b'{"a": 3}', "a.json: expected an object from label to texts"),
        ("a.json", b'{"train": [["a", "b"]]}', "expected CLINC150's parts train, val, test; val, test missing"),
        ("a.json", b'{"train": [["a"]], "val": [], "test": []}', r"row 1 of 'train': expected \[text, intent\]"),
        ("a.json", b'[{"text": "a"}]', "a.json, row 1: expected columns text and label; label missing"),
        ("a.json", b'{"x": ["a", ""]}', "text 2 of 'x': expected a text, got ''"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n\n[1]\n', "a.jsonl, line 3: expected an object with 'text' and"),
        ("a.txt", b"a", "a.txt: expected a file whose name ends in .csv, .tsv, .json, .jsonl"),
    ],
)
def test_broken_files_say_where(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)


def test_examples_refuse():
    with pytest.raises(ValueError, match="examples: expected at least one label, got none"):
        Examples({})
    with pytest.raises(ValueError, match="expected at least one example of 'a', got none; remove the label"):
        Examples({"a": []})
    with pytest.raises(ValueError, match="example 1 of 'a': expected a text, got an empty one"):
        Examples({"a": ["b", " "]})
    with pytest.raises(TypeError, match="expected a list of examples of 'a', got str"):
        Examples({"a": "bcd"})
    assert list(Examples({"a": ["b", "c", "b"]})["a"]) == ["b", "c"]


# Splits.


def test_a_split_is_by_class(generator):
    seed = int(torch.randint(10**6, (), generator=generator))
    found = split(TEXTS, validation=0.3, test=["f", "b"], seed=seed)
    assert [len(part) for part in found] == [3, 2, 2]
    assert list(found.test) == ["f", "b"]
    assert sorted(label for part in found for label in part) == list("abcdefg")
    assert all(list(part[label]) == TEXTS[label] for part in found for label in part)
    assert found.validation.keys() == split(TEXTS, validation=0.3, test=["f", "b"], seed=seed).validation.keys()


def test_a_split_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"validation: expected labels among a, b, .*; got 'x'"):
        split(TEXTS, validation=["x"])
    with pytest.raises(ValueError, match="validation, test: expected different classes, got in both a"):
        split(TEXTS, validation=["a", "b"], test=["a"])
    with pytest.raises(ValueError, match="expected classes for training, validation and test, got 2 classes"):
        split({"a": ["b"], "c": ["d"]})
    with pytest.raises(ValueError, match=r"test: expected labels or a share between 0 and 1, got 1\.5"):
        split(TEXTS, test=1.5)
    path = tmp_path / "data.csv"
    path.write_text("text,label\nsame,a\nother,a\nb,b\nsame,c\n")
    message = r"no text in both training and test, got 1: 'same' \(.*line 2; .*line 5\); remove .* drop_shared=True"
    with pytest.raises(ValueError, match=message):
        split(read_examples(path), validation=["b"], test=["c"])
    kept = split(read_examples(path), validation=["b"], test=["c"], drop_shared=True)
    assert dict(kept.training) == {"a": ["other"]}
    with pytest.raises(ValueError, match="classes of training and validation apart, got in both a; give each class"):
        kept._replace(validation=kept.training).checked()


# Episodes.


def test_an_episode_is_from_its_classes_alone(generator):
    tasks = FewShot(TEXTS, ways=4, shots=2, queries=3, seed=int(torch.randint(10**6, (), generator=generator)))
    support, query = next(tasks.batches(6))
    assert support["label"].tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 6
    assert query["text"].shape[:2] == (6, 12)
    for task in range(6):
        seen = {}
        for batch in (support, query):
            for row, label in zip(batch["text"][task].tolist(), batch["label"][task].tolist(), strict=True):
                text = bytes(row).rstrip(b"\0").decode()
                assert text in TEXTS[text[0]]
                assert seen.setdefault(text, label) == label
                assert seen.setdefault(text[0] + "?", label) == label
        assert len([text for text in seen if not text.endswith("?")]) == 4 * 5
    longest = max((support["text"] != 0).sum(-1).max(), 0)
    assert support["text"].shape[2] == longest


def test_the_stream_is_the_same_with_workers_and_from_the_middle():
    tasks = FewShot(TEXTS, ways=3, shots=1, queries=2, seed=5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    here = list(tasks.batches(2, stop=9))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(here) == 5
    assert here[-1][0]["label"].shape[0] == 1
    assert equal(here, list(tasks.batches(2, stop=9, workers=2)))
    assert equal(here[2:], list(tasks.batches(2, start=4, stop=9)))
    assert not equal(here[0][1]["label"], here[0][1]["text"][..., 0])
    other = FewShot(TEXTS, ways=3, shots=1, queries=2, seed=6)
    assert [other[n].support["text"].tolist() for n in range(3)] != [
        tasks[n].support["text"].tolist() for n in range(3)
    ]


class Tokenizer:
    pad_token_id = 9

    def __call__(self, texts, truncation, max_length):
        assert truncation
        return {"input_ids": [[100 + ord(char) for char in text][:max_length] for text in texts]}


def test_a_tokenizer():
    tasks = FewShot(TEXTS, ways=2, shots=3, queries=1, tokenizer=Tokenizer(), max_length=6, multiple=4)
    for support, query in tasks.batches(3, stop=12):
        for batch in (support, query):
            assert set(batch) == {"input_ids", "attention_mask", "labels"}
            assert batch["input_ids"].shape[2] in (4, 8)
            assert ((batch["input_ids"] == 9) == (batch["attention_mask"] == 0)).all()
            assert 2 <= batch["attention_mask"].sum(-1).min() <= batch["attention_mask"].sum(-1).max() <= 6


def test_without_shuffling_labels_keep_their_meaning():
    tasks = FewShot(TEXTS, ways=7, shots=1, queries=1, shuffle=False)
    for support, _ in tasks.batches(1, stop=5):
        assert bytes(support["text"][0, :, 0].tolist()) == b"abcdefg"


def test_tensors(generator):
    x = torch.randn(12, 4, generator=generator)
    tasks = FewShot(TensorDataset(x, torch.arange(12) % 3), ways=2, shots=1, queries=2, multiple=8)
    (inputs, labels), _ = next(tasks.batches(5))
    assert inputs.shape == (5, 2, 4)  # features are not padded
    assert labels.tolist() == [[0, 1]] * 5
    assert all((x == row).all(1).any() for row in inputs.flatten(0, 1))


def test_few_shot_refuses():
    with pytest.raises(ValueError, match="ways: expected at most 7, the number of classes, got 8"):
        FewShot(TEXTS, ways=8)
    with pytest.raises(ValueError, match=r"at least 5 \+ 10 examples of every class; 'a' has 12, .*; remove these"):
        FewShot(TEXTS)
    with pytest.raises(ValueError, match="shots: expected a positive number, got 0"):
        FewShot(TEXTS, shots=0)
    with pytest.raises(TypeError, match="ways: expected an int, got float"):
        FewShot(TEXTS, ways=2.0)
    with pytest.raises(TypeError, match="seed: expected an int, got str"):
        FewShot(TEXTS, queries=1, seed="1")
    with pytest.raises(ValueError, match=r"text without NUL characters, not empty; got 'a\\x00' of 'a'"):
        FewShot({"a": ["a\0", "b"]}, ways=1, shots=1, queries=1)
    with pytest.raises(TypeError, match="examples: expected texts or tensors, got int of 'a'"):
        FewShot({"a": [1, 2]}, ways=1, shots=1, queries=1)
    with pytest.raises(ValueError, match=r"tensors of one shape, got \[\(2,\), \(3,\)\] of 'a'"):
        FewShot({"a": [torch.ones(2), torch.ones(3)]}, ways=1, shots=1, queries=1)
    with pytest.raises(ValueError, match="tokenizer: expected ids of every text, got none of 'b' of 'a'"):
        FewShot({"a": ["b"] * 1 + ["c"]}, ways=1, shots=1, queries=1, tokenizer=lambda t, **o: {"input_ids": [[], [1]]})
    with pytest.raises(ValueError, match="start, stop, workers: expected 0 <= start <= stop"):
        FewShot(TEXTS, queries=1).batches(2, start=3, stop=1)


# Mixtures.


class Numbers(Tasks):
    """Tasks whose examples are all one number."""

    def __init__(self, number, examples=2):
        super().__init__()
        self.number, self.examples = number, examples

    def __getitem__(self, number):
        batch = {"x": torch.full((self.examples, 1 + number % 3), float(self.number))}
        return Episode(batch, batch)


def test_a_mixture_draws_by_its_shares():
    mixture = Mixture({"one": Numbers(1), "two": Numbers(2)}, {"one": 3, "two": 1}, block=4, seed=3)
    names = [mixture.family_of(n) for n in range(1600)]
    assert all(len(set(names[n : n + 4])) == 1 for n in range(0, 1600, 4))
    assert 250 < Counter(names[::4])["one"] < 350
    support, _ = next(mixture.batches(4, start=8))
    assert support["x"].shape == (4, 2, 3)
    assert set(support["x"].unique().tolist()) <= {0, float(1 + (names[8] == "two"))}


def test_size_shares():
    assert size_shares({"a": 900, "b": 100}) == pytest.approx({"a": 0.9, "b": 0.1})
    assert size_shares({"a": 900, "b": 100}, temperature=2) == pytest.approx({"a": 0.75, "b": 0.25})
    with pytest.raises(ValueError, match="sizes, temperature: expected positive numbers"):
        size_shares({"a": 0})


def test_mixtures_refuse():
    with pytest.raises(ValueError, match="families: expected at least one, got none"):
        Mixture({})
    with pytest.raises(TypeError, match="families: expected sources of tasks, got dict as 'a'"):
        Mixture({"a": TEXTS})
    with pytest.raises(ValueError, match="shares: expected a positive number for each of a, b, got"):
        Mixture({"a": Numbers(1), "b": Numbers(2)}, {"a": 1})
    tokens = FewShot(TEXTS, queries=1, tokenizer=Tokenizer())
    other = FewShot(TEXTS, queries=1, tokenizer=lambda texts, **options: {"input_ids": [[1]] * len(texts)})
    with pytest.raises(ValueError, match="families: expected one padding value of a leaf, got several"):
        Mixture({"a": tokens, "b": other})
    mixed = Mixture({"a": Numbers(1), "b": tokens}, seed=1)
    with pytest.raises(ValueError, match="tasks: expected tasks of the same structure in a batch, got several"):
        list(mixed.batches(20, stop=20))
    sizes = Mixture({"a": Numbers(1), "b": Numbers(2, examples=3)}, seed=1)
    with pytest.raises(ValueError, match="support: expected as many examples in every task of a batch, got"):
        list(sizes.batches(20, stop=20))


# Corpora, laid out as published.


def test_clinc150(tmp_path):
    domains = {name: [f"{name}_{n}" for n in range(2)] for name in ("banking", "travel", "work", "home")}
    rows = [[f"{intent} {n}", intent] for of in domains.values() for intent in of for n in range(3)]
    rows.append(["banking_0 0", "home_1"])
    (tmp_path / "domains.json").write_text(json.dumps(domains))
    (tmp_path / "data_full.json").write_text(
        json.dumps({"train": rows, "val": [], "test": [], "oos_val": [["x", "oos"]]})
    )
    found = clinc150(tmp_path)
    assert [list(part) for part in found] == [domains["home"], domains["work"], domains["banking"] + domains["travel"]]
    assert len(found.training["home_1"]) == 3
    with pytest.raises(ValueError, match="test: expected domains among banking, travel, work, home; got bank"):
        clinc150(tmp_path, test=["bank"])
    (tmp_path / "domains.json").write_text("{")
    with pytest.raises(ValueError, match=r"domains.json: expected a JSON object from domain to intents"):
        clinc150(tmp_path)


def test_huffpost(tmp_path):
    labels = {"train": ["1", "2"], "valid": ["3"], "test": ["4"]}
    for fold, parts in ((1, labels), (2, {**labels, "train": ["1", "4"], "test": ["2"]})):
        folder = tmp_path / f"{fold:02}"
        folder.mkdir()
        for part, of_part in parts.items():
            (folder / f"labels.{part}.txt").write_text("\n".join(of_part))
    for part, of_part in labels.items():
        lines = [json.dumps({"sentence": f"a\u2028{label} {n}", "label": label}) for label in of_part for n in range(2)]
        (tmp_path / "01" / f"{part}.json").write_text("\n".join(lines) + "\n")
    assert [list(part) for part in huffpost(tmp_path, 2)] == [["1", "4"], ["3"], ["2"]]
    assert huffpost(tmp_path).test["4"][0] == "a\u20284 0"
    with pytest.raises(ValueError, match="fold: expected 1 to 5, got 6"):
        huffpost(tmp_path, 6)


def test_items_that_are_no_pairs():
    class Single(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return torch.ones(2)

    with pytest.raises(ValueError, match=r"dataset, item 0: expected a pair \(x, y\), got Tensor"):
        read_examples(Single())
