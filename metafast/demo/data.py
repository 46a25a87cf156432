"""The three sets of languages, as episodes are drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

from metafast.tasks import cldr
from metafast.tasks.text import LabelledText


@dataclass(frozen=True)
class Languages:
    """Names of the languages that train, choose hyperparameters and test; of the last, those in Latin script apart."""

    training: LabelledText
    validation: LabelledText
    test: LabelledText
    test_latin: LabelledText

    @classmethod
    def load(cls, max_length: int) -> Languages:
        names = cldr.names()
        latin = [code for code in cldr.TEST if cldr.script(names[code]) == "LATIN"]
        sets = (cldr.training_languages(), cldr.VALIDATION, cldr.TEST, latin)
        return cls(*(LabelledText(cldr.select(codes), max_length) for codes in sets))
