"""The three sets of languages, as episodes are drawn from them."""

from __future__ import annotations

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
        names = cldr.names()
        training, latin = cldr.training_languages(), {code for code in names if cldr.script(names[code]) == "LATIN"}
        sets = (
            training,
            [code for code in training if code in latin],
            cldr.VALIDATION,
            cldr.TEST,
            [code for code in cldr.TEST if code in latin],
        )
        return cls(*(LabelledText(cldr.select(codes), max_length) for codes in sets))
