"""Classification whose labels mean the same in every task: a task is a language, a domain, an author."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metafast.arguments import check_positive
from metafast.tasks.few_shot import encode_examples, text_batch
from metafast.tasks.reading import read_examples
from metafast.tasks.source import Episode, Tasks, generator_of, in_turn, padding_id

__all__ = ["Transfer"]

Drawable = list[tuple[Tensor, int]]


class Transfer(Tasks):
    """Episodes of transfer. Each is of one task: ``shots`` labelled texts to learn from and ``queries`` others.

    A batch is that of :class:`metafast.tasks.FewShot` for texts, with the numbers of ``labels``. Texts are drawn whatever
    their label.

    Args:
        tasks: labelled texts by task, each whatever :func:`metafast.tasks.read_examples` reads; all have the same labels.
        queries_from: labelled texts of the same tasks that query sets are drawn from; None: ``tasks``, without those of the
            support set.
        shots, queries: texts in the support set and in the query set.
        tokenizer, max_length: as for :class:`metafast.tasks.FewShot`.
        seed, multiple: as for :class:`metafast.tasks.Tasks`.

    Attributes:
        names: names of the tasks.
        labels: names of the labels.

    Raises:
        TypeError: an example is no text.
        ValueError: a task has too few texts or other labels than the first.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        queries_from: Mapping[str, Any] | None = None,
        shots: int = 8,
        queries: int = 16,
        tokenizer: Callable[..., Any] | None = None,
        max_length: int = 64,
        seed: int = 0,
        multiple: int = 1,
    ) -> None:
        super().__init__(seed, multiple)
        self.shots = check_positive("shots", shots)
        self.queries = check_positive("queries", queries)
        check_positive("max_length", max_length)
        if not tasks:
            raise ValueError("tasks: expected at least one, got none")
        if queries_from is not None and set(queries_from) != set(tasks):
            raise ValueError(
                f"queries_from: expected texts of {', '.join(tasks)}, got those of {', '.join(queries_from)}"
            )
        self.names = tuple(tasks)
        self.labels = tuple(sorted(read_examples(tasks[self.names[0]])))
        self.tokenizer = tokenizer
        least = shots if queries_from is not None else shots + queries
        self._texts = self._read("tasks", tasks, least, max_length)
        self._others = None if queries_from is None else self._read("queries_from", queries_from, queries, max_length)
        if tokenizer is not None:
            self.padding = {"input_ids": padding_id(tokenizer)}

    def task_of(self, number: int) -> str:
        """The name of an episode's task. Tasks take turns, in an order that each round draws anew."""
        return in_turn(self.names, self.seed, number)

    def __getitem__(self, number: int) -> Episode:
        """Episode ``number``: support and query of one task, without the task dimension."""
        generator = generator_of(self.seed, number)
        name = self.task_of(number)
        drawn = _drawn(self._texts[name], generator)
        others = drawn[self.shots :] if self._others is None else _drawn(self._others[name], generator)
        return Episode(self._batch(drawn[: self.shots]), self._batch(others[: self.queries]))

    def _read(self, argument: str, tasks: Mapping[str, Any], least: int, max_length: int) -> dict[str, Drawable]:
        found: dict[str, Drawable] = {}
        for name, given in tasks.items():
            examples = read_examples(given)
            place = f"{argument}[{name!r}]"
            if set(examples) != set(self.labels):
                raise ValueError(
                    f"{place}: expected the labels {', '.join(self.labels)}, got {', '.join(sorted(examples))}"
                )
            encoded = dict(zip(examples, encode_examples(examples, self.tokenizer, max_length), strict=True))
            if not all(isinstance(text, str) for of_label in examples.values() for text in of_label):
                raise TypeError(f"{place}: expected texts, got tensors")
            found[name] = [(row, number) for number, label in enumerate(self.labels) for row in encoded[label]]
            if len(found[name]) < least:
                raise ValueError(f"{place}: expected at least {least} texts, got {len(found[name])}")
        return found

    def _batch(self, rows: Drawable) -> dict[str, Tensor]:
        labels = torch.tensor([label for _, label in rows])
        padding = self.padding.get("input_ids", 0)
        return text_batch([row for row, _ in rows], labels, padding, bytewise=self.tokenizer is None)


def _drawn(rows: Drawable, generator: torch.Generator) -> Drawable:
    """All of them in random order."""
    return [rows[n] for n in torch.randperm(len(rows), generator=generator).tolist()]
