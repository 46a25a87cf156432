"""Languages, and texts as bytes."""

from __future__ import annotations

import pytest
import torch

from metafast.tasks import cldr
from metafast.tasks.text import encode

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
