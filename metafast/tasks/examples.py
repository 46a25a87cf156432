"""Labelled examples, where each was read, and their splits by class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Examples", "Split", "split"]


class Examples(Mapping[str, Sequence[Any]]):
    """Examples by label, in the order in which they were given: ``examples["weather"]`` is a sequence of texts or tensors.

    An example that comes twice under a label is kept once.

    Args:
        by_label: labels and their examples.
        places: where the examples are from, likewise, such as ``"intents.csv, line 12"``; None: their positions.

    Raises:
        TypeError: ``by_label`` is no mapping of sequences.
        ValueError: there is no label, a label has no example, or a text is empty.
    """

    def __init__(
        self, by_label: Mapping[str, Sequence[Any]], places: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        if not isinstance(by_label, Mapping):
            raise TypeError(f"examples: expected a mapping from label to examples, got {type(by_label).__name__}")
        if not by_label:
            raise ValueError("examples: expected at least one label, got none")
        self._by_label: dict[str, list[Any]] = {}
        self._places: dict[str, list[str]] = {}
        for label, given in by_label.items():
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise TypeError(f"examples: expected a list of examples of {label!r}, got {type(given).__name__}")
            where = places[label] if places is not None else [f"example {n} of {label!r}" for n in range(len(given))]
            self._add(label, given, where)

    def _add(self, label: str, given: Sequence[Any], where: Sequence[str]) -> None:
        kept: list[int] = []
        seen: set[str] = set()
        for index, example in enumerate(given):
            if isinstance(example, str):
                if not example.strip():
                    raise ValueError(f"{where[index]}: expected a text, got an empty one; remove the row or fill it in")
                if example in seen:
                    continue
                seen.add(example)
            kept.append(index)
        if not kept:
            raise ValueError(f"examples: expected at least one example of {label!r}, got none; remove the label")
        self._by_label[label] = [given[index] for index in kept]
        self._places[label] = [where[index] for index in kept]

    def __getitem__(self, label: str) -> Sequence[Any]:
        return self._by_label[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_label)

    def __len__(self) -> int:
        return len(self._by_label)

    def __repr__(self) -> str:
        return f"Examples({len(self)} labels, {sum(map(len, self.values()))} examples)"

    def place(self, label: str, index: int) -> str:
        """Where example ``index`` of a label was read."""
        return self._places[label][index]

    def select(self, labels: Sequence[str], argument: str = "labels") -> Examples:
        """The examples of some labels, in the order asked for.

        Args:
            labels: labels, none twice.
            argument: the name of ``labels`` in error messages.

        Raises:
            ValueError: a label is unknown or comes twice.
        """
        unknown = [label for label in labels if label not in self._by_label]
        if unknown:
            raise ValueError(
                f"{argument}: expected labels among {_some(list(self))}; got {_some(list(map(repr, unknown)))}"
            )
        twice = sorted({label for label in labels if list(labels).count(label) > 1})
        if twice:
            raise ValueError(f"{argument}: expected no label twice, got {_some(twice)}")
        return Examples(
            {label: self._by_label[label] for label in labels}, {label: self._places[label] for label in labels}
        )

    def without(self, others: Mapping[str, Sequence[Any]]) -> Examples:
        """The examples whose text is in none of ``others``; labels that are left without any go."""
        texts = {text for of_label in others.values() for text in of_label if isinstance(text, str)}
        keep = {
            label: [n for n, example in enumerate(of_label) if not (isinstance(example, str) and example in texts)]
            for label, of_label in self._by_label.items()
        }
        return Examples(
            {label: [self._by_label[label][n] for n in kept] for label, kept in keep.items() if kept},
            {label: [self._places[label][n] for n in kept] for label, kept in keep.items() if kept},
        )


class Split(NamedTuple):
    """Whole classes for training, for choosing hyperparameters, and for the final evaluation alone."""

    training: Examples
    validation: Examples
    test: Examples

    def checked(self) -> Split:
        """This split, after the check that its parts share no class and no text.

        Raises:
            ValueError: they do; the message says which, and where they were read.
        """
        for first, second in ((0, 1), (0, 2), (1, 2)):
            names, (one, other) = (self._fields[first], self._fields[second]), (self[first], self[second])
            shared = [label for label in one if label in other]
            if shared:
                raise ValueError(
                    f"split: expected classes of {names[0]} and {names[1]} apart, got in both {_some(shared)}; "
                    "give each class to one part"
                )
            _check_texts(names, one, other)
        return self


def split(
    examples: Examples | Mapping[str, Sequence[Any]],
    *,
    validation: Sequence[str] | float = 0.2,
    test: Sequence[str] | float = 0.2,
    seed: int = 0,
    drop_shared: bool = False,
) -> Split:
    """Splits examples by class, never by example: a class belongs to one part.

    Args:
        examples: examples by label.
        validation, test: labels, or a share of the classes, at least one, drawn by ``seed``.
        seed: seed of the draw.
        drop_shared: whether a text that is also in the held-out parts is dropped from the others, test before validation
            before training; False: a ValueError.

    Raises:
        ValueError: labels are unknown, in both parts, or none is left for training; a text is on both sides.
    """
    examples = examples if isinstance(examples, Examples) else Examples(examples)
    generator = torch.Generator().manual_seed(seed)
    rest = [list(examples)[n] for n in torch.randperm(len(examples), generator=generator)]
    parts: dict[str, Sequence[str]] = {}
    for name, asked in (("test", test), ("validation", validation)):
        if not isinstance(asked, float | int):
            parts[name] = list(examples.select(asked, name))
    both = [label for label in parts.get("test", ()) if label in parts.get("validation", ())]
    if both:
        raise ValueError(f"validation, test: expected different classes, got in both {_some(both)}")
    rest = [label for label in rest if all(label not in part for part in parts.values())]
    for name, asked in (("test", test), ("validation", validation)):
        if isinstance(asked, float | int):
            if not 0 < asked < 1:
                raise ValueError(f"{name}: expected labels or a share between 0 and 1, got {asked}")
            count = max(1, round(asked * len(examples)))
            parts[name], rest = rest[:count], rest[count:]
    training = [label for label in examples if label in set(rest)]
    if not training or not parts["validation"] or not parts["test"]:
        raise ValueError(
            f"examples: expected classes for training, validation and test, got {len(examples)} classes; "
            "add classes or hold fewer out"
        )
    found = Split(*(examples.select(labels) for labels in (training, parts["validation"], parts["test"])))
    if drop_shared:
        kept = found.validation.without(found.test)
        found = Split(found.training.without(found.test).without(kept), kept, found.test)
    return found.checked()


def _check_texts(names: tuple[str, str], one: Examples, other: Examples) -> None:
    places = {
        text: one.place(label, index)
        for label, of_label in one.items()
        for index, text in enumerate(of_label)
        if isinstance(text, str)
    }
    shared = [
        f"{text!r} ({places[text]}; {other.place(label, index)})"
        for label, of_label in other.items()
        for index, text in enumerate(of_label)
        if isinstance(text, str) and text in places
    ]
    if shared:
        raise ValueError(
            f"split: expected no text in both {names[0]} and {names[1]}, got {len(shared)}: {_some(shared, 3)}; "
            "remove them from one side, or pass drop_shared=True"
        )


def _some(items: Sequence[str], most: int = 8) -> str:
    """The first of many items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
