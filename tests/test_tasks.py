"""Languages and episodes."""

from __future__ import annotations

import pytest
import torch

from metafast.tasks import cldr
from metafast.tasks.text import LabelledText, encode, read_csv

pytest.importorskip("babel", reason="Babel is not installed")


def test_languages_are_split_whole():
    training, validation, test = map(set, cldr.split())
    assert len(test) >= 20
    assert not training & validation
    assert not training & test
    assert not validation & test
    assert training | validation | test == set(cldr.names())
    assert set(cldr.EXAMPLE) <= test


def test_the_split_follows_its_rule():
    scripts = {code: cldr.script(names) for code, names in cldr.names().items()}
    by_script = {
        script: [code for code in sorted(scripts) if scripts[code] == script]
        for script in sorted(set(scripts.values()))
    }
    alone = [codes[0] for codes in by_script.values() if len(codes) == 1]
    shared = [code for codes in by_script.values() if len(codes) > 1 for code in codes]
    split = cldr.split()
    assert set(alone) <= {*split.validation, *split.test}
    assert set(split.test) - set(cldr.EXAMPLE) == {*alone[::2], *shared[2::10]} - set(cldr.EXAMPLE)
    assert set(split.validation) == {*alone[1::2], *shared[7::10]} - set(split.test)


def test_some_held_out_scripts_are_seen_by_no_training_language():
    scripts = {code: cldr.script(names) for code, names in cldr.names().items()}
    seen = {scripts[code] for code in cldr.split().training}
    unseen = {code for code in cldr.split().test if scripts[code] not in seen}
    assert {"ka", "hy", "he", "th"} <= unseen
    assert len(unseen) == 12
    assert sum(scripts[code] == "LATIN" for code in cldr.split().test) == 11


def test_a_name_is_in_one_language_alone():
    owners = {}
    for code, names in cldr.names().items():
        assert len(names) == len(set(names)) > 100
        for name in names:
            assert len(name.encode()) >= cldr.SHORTEST
            assert owners.setdefault(name.casefold(), code) == code
    assert "საქართველო" in cldr.names()["ka"]


def test_selecting_languages():
    assert list(cldr.select(["ka", "br"])) == ["ka", "br"]
    with pytest.raises(ValueError, match=r"languages: expected codes among .*; got 'xx'"):
        cldr.select(["ka", "xx"], "languages")
    with pytest.raises(ValueError, match="codes: expected no language twice, got ka, ka"):
        cldr.select(["ka", "ka"])
    assert cldr.english_name("ka") == "Georgian"
    with pytest.raises(ValueError, match="texts: expected at least one letter"):
        cldr.script(["12"])


def test_encoding():
    assert encode(["ab", "é"], 3).tolist() == [[97, 98, 0], [195, 169, 0]]
    assert encode(["abcd"], 3).dtype == torch.uint8
    for text in ("", "a\0b"):
        with pytest.raises(ValueError, match="texts: expected text without NUL characters, not empty"):
            encode([text], 3)
    with pytest.raises(ValueError, match="max_length: expected a positive number, got 0"):
        encode(["a"], 0)


TEXTS = {label: [label + digit for digit in "0123456789"] for label in "abcde"}


def test_episodes(generator):
    support, query = LabelledText(TEXTS, 4).sample(7, 3, 2, 4, generator)
    assert support["text"].shape == (7, 6, 4)
    assert query["text"].shape == (7, 12, 4)
    for t in range(7):
        letters = {}
        for batch, count in ((support, 2), (query, 4)):
            assert batch["label"][t].bincount().tolist() == [count] * 3
            for text, label in zip(batch["text"][t].tolist(), batch["label"][t].tolist(), strict=True):
                assert letters.setdefault(label, text[0]) == text[0]  # a label is one letter throughout an episode
        assert len(set(letters.values())) == 3
        texts = [tuple(text) for batch in (support, query) for text in batch["text"][t].tolist()]
        assert len(set(texts)) == len(texts)
    first_ways = {support["text"][t, 0, 0].item() for t in range(7)}
    assert len(first_ways) > 1  # which label a letter gets is drawn anew


def test_episodes_depend_on_their_generator_alone():
    names = LabelledText(TEXTS, 4)
    drawn = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        drawn.append(names.sample(2, 3, 2, 2, torch.Generator().manual_seed(0))[0]["text"])
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 3, 2, 2), "tasks: expected a positive number, got 0"),
        ((1, 6, 2, 2), "ways: expected at most 5, the number of labels, got 6"),
        ((1, 3, 9, 2), r"shots \+ queries: label 'a' has 10 texts, got 9 \+ 2"),
    ],
)
def test_bad_episodes(numbers, message, generator):
    with pytest.raises(ValueError, match=message):
        LabelledText(TEXTS, 4).sample(*numbers, generator)


def test_no_labels():
    with pytest.raises(ValueError, match="texts: expected at least one label"):
        LabelledText({}, 4)


def test_csv(tmp_path):
    path = tmp_path / "names.csv"
    path.write_text("text,other,label\na b,1,x\nc,2,y\na b,3,x\n", encoding="utf-8-sig")
    assert read_csv(path) == {"x": ["a b"], "y": ["c"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,kind\na,b\n", "expected columns text and label; label missing, found text, kind"),
        (b"", "expected columns text and label; text and label missing, found none"),
        (b"text,label\na,\n", "line 2: expected a text and a label"),
        (b"text,label\n", "expected at least one row, got none"),
        (b"text,label\n\xff,b\n", "expected UTF-8 text"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    path = tmp_path / "names.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_csv(path)
