"""Tasks of pairs of texts: translation by language, dialogue by person, and the corpora that they are drawn from."""

from __future__ import annotations

import csv

import pytest
import torch

from metafast.tasks import Dialogue, Transfer, Translation, cldr
from metafast.tasks.corpora import nusax_sentiment, nusax_translation, persona_chat

PAIRS = {name: [(f"source {n} é", f"{name} {n}") for n in range(9)] for name in ("a", "bb", "ccc")}


def text(ids):
    return bytes(n for n in ids.tolist() if n not in (0, 2, 3, -100)).decode()


class Words:
    """A tokenizer as Hugging Face's are: a word is an id, 7 pads, 8 ends a text unless that is turned off."""

    pad_token_id, bos_token_id, eos_token_id = 7, None, 8
    sep_token_id = 9

    def __init__(self):
        self.ids = {}

    def __call__(self, texts, truncation, max_length, add_special_tokens=True):
        rows = [[self.ids.setdefault(word, 10 + len(self.ids)) for word in text.split()] for text in texts]
        ends = [8] if add_special_tokens else []
        return {"input_ids": [row[: max_length - len(ends)] + ends for row in rows]}


# Translation.


def test_translation_draws_pairs_of_one_language():
    tasks = Translation(PAIRS, shots=3, queries=4, seed=2)
    support, query = next(tasks.batches(3))
    assert sorted(tasks.language_of(n) for n in range(3)) == sorted(PAIRS)
    for number in range(3):
        language = tasks.language_of(number)
        drawn = []
        for batch, count in ((support, 3), (query, 4)):
            assert batch["labels"].shape[:2] == (3, count)
            pairs = zip(batch["input_ids"][number], batch["labels"][number], strict=True)
            drawn += [(text(source), text(target)) for source, target in pairs]
            ends = (batch["labels"][number] == 3).sum(1)
            assert torch.equal(ends, torch.ones(count, dtype=torch.int64))
            assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
        assert len(set(drawn)) == 7
        assert set(drawn) <= set(PAIRS[language])


def test_an_episode_depends_on_seed_and_number_alone():
    tasks = Translation(PAIRS, shots=2, queries=2, seed=5)
    streams = [
        list(tasks.batches(2, stop=8)),
        list(Translation(PAIRS, shots=2, queries=2, seed=5).batches(2, stop=8, workers=1)),
    ]
    later = list(tasks.batches(2, start=4, stop=8))
    for one, other in [*zip(*streams, strict=True), *zip(streams[0][2:], later, strict=True)]:
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_queries_from_other_pairs():
    others = {name: [(f"other {n}", "x") for n in range(5)] for name in PAIRS}
    support, query = next(Translation(PAIRS, queries_from=others, shots=9, queries=5).batches(3))
    assert {text(row) for row in support["input_ids"].flatten(0, 1)} == {source for source, _ in PAIRS["a"]}
    assert {text(row) for row in query["input_ids"].flatten(0, 1)} == {f"other {n}" for n in range(5)}


def test_translation_with_a_tokenizer():
    tasks = Translation(PAIRS, shots=2, queries=2, tokenizer=Words(), max_length=3)
    support, _ = next(tasks.batches(3))
    assert (support["labels"] == 8).sum(2).eq(1).all()
    assert support["input_ids"].shape[2] == 3
    assert support["attention_mask"].all()


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        ([("a", "b")], {}, TypeError, "pairs: expected a mapping from task to pairs of texts, got list"),
        ({}, {}, ValueError, "pairs: expected at least one task, got none"),
        ({"a": ["x"]}, {}, TypeError, r"pairs\['a'\]\[0\]: expected a pair of texts, got 'x'"),
        ({"a": [("x", " ")]}, {}, ValueError, r"pairs\['a'\]\[0\]: expected texts that are not empty"),
        (PAIRS, {"shots": 8, "queries": 2}, ValueError, "at least 10 pairs of every task, 'a' has 9"),
        (PAIRS, {"shots": 2, "queries": 2, "queries_from": PAIRS}, ValueError, "both have 'source 0 é'"),
        (
            PAIRS,
            {"shots": 2, "queries": 2, "queries_from": {"z": []}},
            ValueError,
            "expected pairs of a, bb, ccc, got pairs of z",
        ),
        (
            {"a": [("x\x03", "y"), ("u", "v")]},
            {"shots": 1, "queries": 1},
            ValueError,
            "without the control characters 0, 2 and 3",
        ),
    ],
)
def test_wrong_pairs(pairs, options, error, message):
    with pytest.raises(error, match=message):
        Translation(pairs, **options)


# Dialogue.

PEOPLE = {f"person {p}": [(f"heard {p} {n}", f"said {p} {n}") for n in range(6)] for p in range(4)}


def test_dialogue_learns_from_first_turns():
    tasks = Dialogue(PEOPLE, shots=2, queries=3, max_length=30)
    support, query = next(tasks.batches(4))
    for number in range(4):
        person = tasks.person_of(number)
        for batch, turns in ((support, PEOPLE[person][:2]), (query, PEOPLE[person][2:5])):
            for ids, labels, (heard, said) in zip(
                batch["input_ids"][number], batch["labels"][number], turns, strict=True
            ):
                row = [*heard.encode(), 2, *said.encode(), 3]
                assert ids[: len(row)].tolist() == row
                expected = [-100] * (len(heard) + 1) + row[len(heard) + 1 :]
                assert labels.tolist() == expected + [-100] * (len(labels) - len(row))
    assert torch.equal(support["attention_mask"], (support["input_ids"] != 0).long())


def test_long_turns_keep_the_end_of_what_was_heard():
    tasks = Dialogue({"a": [("abcdefgh", "ijklmnop"), ("x", "y")]}, shots=1, queries=1, max_length=8)
    ids = tasks[0].support["input_ids"][0].tolist()
    assert bytes(ids) == b"fgh\x02ijk\x03"


def test_what_was_heard_is_learned_where_asked_for():
    support, query = next(Dialogue(PEOPLE, shots=2, queries=2, learn_heard=True).batches(4))
    assert torch.equal(support["labels"].clamp(min=0), support["input_ids"])
    assert (query["labels"][..., 0] == -100).all()


def test_dialogue_with_a_tokenizer():
    tasks = Dialogue(PEOPLE, shots=1, queries=1, tokenizer=Words())
    row = tasks[0].support["input_ids"][0].tolist()
    assert (row.count(9), row[-1], len(row)) == (1, 8, 8)
    with pytest.raises(
        ValueError, match="start: expected an id, since the tokenizer has none of bos_token_id, sep_token_id"
    ):
        Dialogue(PEOPLE, shots=1, queries=1, tokenizer=lambda texts, **options: {"input_ids": [[1] for _ in texts]})


# Transfer.

SENTIMENT = {
    language: {label: [f"{language} {label} {n}" for n in range(6)] for label in ("good", "bad")} for language in "xyz"
}


def test_transfer_keeps_what_labels_mean():
    tasks = Transfer(SENTIMENT, shots=5, queries=7)
    assert tasks.labels == ("bad", "good")
    support, query = next(tasks.batches(3))
    for number in range(3):
        language = tasks.task_of(number)
        drawn = []
        for batch, count in ((support, 5), (query, 7)):
            assert batch["label"].shape == (3, count)
            for row, label in zip(batch["text"][number], batch["label"][number], strict=True):
                drawn.append(text(row))
                assert drawn[-1].startswith(f"{language} {tasks.labels[label]} ")
        assert len(set(drawn)) == 12


def test_transfer_to_other_texts():
    others = {language: {label: [f"other {label}"] for label in ("good", "bad")} for language in "xyz"}
    _, query = next(Transfer(SENTIMENT, queries_from=others, shots=12, queries=2).batches(3))
    assert {text(row) for row in query["text"].flatten(0, 1)} == {"other good", "other bad"}


@pytest.mark.parametrize(
    ("tasks", "options", "error", "message"),
    [
        ({}, {}, ValueError, "tasks: expected at least one, got none"),
        (SENTIMENT, {"shots": 12}, ValueError, r"tasks\['x'\]: expected at least 13 texts, got 12"),
        (SENTIMENT | {"u": {"good": ["a"]}}, {}, ValueError, r"tasks\['u'\]: expected the labels bad, good, got good"),
        (SENTIMENT, {"queries_from": {"x": {}}}, ValueError, "queries_from: expected texts of x, y, z, got those of x"),
        ({"x": {"a": [torch.zeros(2)]}}, {}, TypeError, r"tasks\['x'\]: expected texts, got tensors"),
    ],
)
def test_wrong_families(tasks, options, error, message):
    with pytest.raises(error, match=message):
        Transfer(tasks, **{"shots": 1, "queries": 1} | options)


# Corpora.


def test_names_as_pairs():
    pytest.importorskip("babel")
    pairs = dict(cldr.translations("de"))
    assert pairs["Germany"] == "Deutschland"
    assert all(english.casefold() != name.casefold() for english, name in pairs.items())
    with pytest.raises(ValueError, match=r"expected codes among .*; got 'xx'"):
        cldr.translations("xx")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def test_nusax(tmp_path):
    for part in ("train", "valid", "test"):
        write(tmp_path / "mt" / f"{part}.csv", [["", "indonesian", "x", "y"], [0, f"satu, {part}", "one", "eins"]])
        write(tmp_path / "sentiment" / "x" / f"{part}.csv", [["id", "text", "label"], [0, f"good {part}", "positive"]])
    assert nusax_translation(tmp_path / "mt")["valid"] == {
        "x": [("satu, valid", "one")],
        "y": [("satu, valid", "eins")],
    }
    assert nusax_translation(tmp_path / "mt", source="y")["test"]["x"] == [("eins", "one")]
    assert dict(nusax_sentiment(tmp_path / "sentiment")["test"]["x"]) == {"positive": ["good test"]}
    with pytest.raises(ValueError, match=r"train.csv: expected a column 'z' and others, got , indonesian, x, y"):
        nusax_translation(tmp_path / "mt", source="z")
    (tmp_path / "mt" / "train.csv").write_text("a,b\n1\n")
    with pytest.raises(ValueError, match=r"train.csv: .*as many fields as columns in line 2"):
        nusax_translation(tmp_path / "mt")


def test_persona_chat(tmp_path):
    said = "User 1: Hi: you!\nUser 2: Hello.\nMore.\nUser 2: Again.\nUser 1: Bye\n"
    for part in ("valid", "test"):
        write(tmp_path / f"{part}.csv", [["user 1 personas", "Best Generated Conversation"], ["I am", said]])
    training, test = persona_chat(tmp_path)
    assert training == test
    assert training == {
        "row 0, user 1": [("Hello. More. Again.", "Bye")],
        "row 0, user 2": [("Hi: you!", "Hello. More. Again.")],
    }
