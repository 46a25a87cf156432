"""The three sets of languages, as episodes are drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metafast.tasks import cldr
from metafast.tasks.text import LabelledText


@dataclass(frozen=True)
class Languages:
    """Names of the languages that train, choose hyperparameters and test; those in Latin script apart, too."""

    training: LabelledText
    training_latin: LabelledText
    validation: LabelledText
    test: LabelledText
    test_latin: LabelledText

    @classmethod
    def load(cls, max_length: int) -> Languages:
        split = cldr.split()

        def latin(codes: Sequence[str]) -> list[str]:
            return [code for code in codes if cldr.script(cldr.names()[code]) == "LATIN"]

        sets = (split.training, latin(split.training), split.validation, split.test, latin(split.test))
        return cls(*(LabelledText(cldr.select(codes), max_length) for codes in sets))
