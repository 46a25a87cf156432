"""The three sets of languages, as episodes are drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from metafast.demo.config import Config
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

    def check(self, config: Config) -> None:
        """Raises ValueError where a set has fewer languages, or a language fewer names, than an episode takes."""
        names = config.shots + config.queries
        for field in fields(self):
            found: LabelledText = getattr(self, field.name)
            if len(found.labels) < config.ways:
                raise ValueError(
                    f"ways: expected at most {len(found.labels)}, the languages of the set {field.name}, got {config.ways}"
                )
            fewest = min(len(of_label) for of_label in found.encoded)
            if fewest < names:
                raise ValueError(
                    f"shots, queries: expected at most {fewest} together, the fewest names of a language in the set "
                    f"{field.name}, got {config.shots} and {config.queries}"
                )
