"""The three sets of languages, and the tasks that are drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from metafast.demo.config import Config
from metafast.tasks import Episode, FewShot, Tasks, cldr

Names = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Languages:
    """Names of the languages that train, choose hyperparameters and test; those in Latin script apart, too."""

    training: Names
    training_latin: Names
    validation: Names
    test: Names
    test_latin: Names

    @classmethod
    def load(cls) -> Languages:
        split = cldr.split()

        def latin(codes: Sequence[str]) -> list[str]:
            return [code for code in codes if cldr.script(cldr.names()[code]) == "LATIN"]

        sets = (split.training, latin(split.training), split.validation, split.test, latin(split.test))
        return cls(*(cldr.select(codes) for codes in sets))

    def check(self, config: Config) -> None:
        """Raises ValueError where a set has fewer languages, or a language fewer names, than an episode takes."""
        names = config.shots + config.queries
        for field in fields(self):
            found: Names = getattr(self, field.name)
            if len(found) < config.ways:
                raise ValueError(
                    f"ways: expected at most {len(found)}, the languages of the set {field.name}, got {config.ways}"
                )
            fewest = min(map(len, found.values()))
            if fewest < names:
                raise ValueError(
                    f"shots, queries: expected at most {fewest} together, the fewest names of a language in the set "
                    f"{field.name}, got {config.shots} and {config.queries}"
                )


def few_shot(config: Config, names: Names, seed: int) -> FewShot:
    """Episodes of some languages, of the settings' sizes."""
    return FewShot(
        names,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
        max_length=config.max_length,
        seed=seed,
        multiple=config.max_length,
    )


class LanguageTasks(Tasks):
    """The tasks of training. In every meta-step half of them, rounded down, are among languages in Latin script alone.

    Scripts tell most languages apart at a glance. Without tasks in which they do not, little is learned of what does.
    """

    def __init__(self, config: Config, languages: Languages) -> None:
        super().__init__(config.seed)
        self._all = few_shot(config, languages.training, config.seed)
        self._latin = few_shot(config, languages.training_latin, config.seed)
        self._tasks = config.tasks

    def __getitem__(self, number: int) -> Episode:
        """Episode ``number``; those of a meta-step follow one another, the ones in Latin script last."""
        in_latin = number % self._tasks >= self._tasks - self._tasks // 2
        return (self._latin if in_latin else self._all)[number]
