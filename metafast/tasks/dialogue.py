"""Personalised dialogue: a task is a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metafast.arguments import check_positive
from metafast.tasks.pairs import END, NO_LABEL, START, Pair, Tokenizer, check_pairs, encode_texts, padded
from metafast.tasks.source import Episode, Tasks, in_turn, padding_id

__all__ = ["Dialogue"]


class Dialogue(Tasks):
    """Episodes of dialogue. Each is of one person: the first ``shots`` turns to learn from, the next ``queries`` to predict.

    A batch is what language models of Hugging Face are trained with: ``{"input_ids", "attention_mask", "labels": int64
    [tasks, n, length]}``. A row is what the person heard, an id that starts the answer, the answer, an id that ends it;
    labels are −100 up to the start of the answer, so that only what the person says is learned.

    Args:
        people: for each person, in order, pairs of what was said to the person and what the person answered.
        shots, queries: turns in the support set and in the query set.
        tokenizer: as Hugging Face's tokenizers are called; None: bytes.
        learn_heard: whether what was said to the person is learned from, too, in support sets: all ids are labels there.
        start, end: ids that start and end an answer; None: 2 and 3 for bytes, and of a tokenizer ``bos_token_id`` or
            ``sep_token_id``, and ``eos_token_id`` or ``sep_token_id``.
        max_length: ids of a row: the end of what was heard, at most half of them, and the beginning of the answer.
        seed, multiple: as for :class:`metafast.tasks.Tasks`.

    Attributes:
        names: names of the people.

    Raises:
        TypeError: ``people`` is not as described.
        ValueError: a person has too few turns, a text is empty, or the tokenizer does not know such ids.
    """

    def __init__(
        self,
        people: Mapping[str, Sequence[Pair]],
        *,
        shots: int = 4,
        queries: int = 4,
        tokenizer: Tokenizer | None = None,
        learn_heard: bool = False,
        start: int | None = None,
        end: int | None = None,
        max_length: int = 64,
        seed: int = 0,
        multiple: int = 1,
    ) -> None:
        super().__init__(seed, multiple)
        self.shots = check_positive("shots", shots)
        self.queries = check_positive("queries", queries)
        if max_length < 4:
            raise ValueError(f"max_length: expected at least 4, got {max_length}")
        checked = check_pairs("people", people, shots + queries)
        self.names = tuple(checked)
        self.start = _special("start", start, tokenizer, START, "bos_token_id", "sep_token_id")
        self.end = _special("end", end, tokenizer, END, "eos_token_id", "sep_token_id")
        self.learn_heard = learn_heard
        self.padding = {"input_ids": padding_id(tokenizer), "labels": NO_LABEL}
        self._rows = {
            name: self._encoded(turns[: shots + queries], tokenizer, max_length) for name, turns in checked.items()
        }

    def person_of(self, number: int) -> str:
        """The person of an episode. People take turns, in an order that each round draws anew."""
        return in_turn(self.names, self.seed, number)

    def __getitem__(self, number: int) -> Episode:
        """Episode ``number``: support and query of one person, without the task dimension."""
        rows = self._rows[self.person_of(number)]
        support, query = rows[: self.shots], rows[self.shots :]
        if self.learn_heard:
            support = [(ids, ids) for ids, _ in support]
        return Episode(self._batch(support), self._batch(query))

    def _encoded(
        self, turns: Sequence[Pair], tokenizer: Tokenizer | None, max_length: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Ids and labels of each turn."""
        options = {} if tokenizer is None else {"add_special_tokens": False}
        # What was heard is cut at its beginning, below.
        heard, said = (
            encode_texts([turn[part] for turn in turns], tokenizer, length, **options)
            for part, length in ((0, 10**6), (1, max_length))
        )
        rows = []
        for before, answer in zip(heard, said, strict=True):
            before = torch.cat((before[-(max_length // 2 - 1) :], before.new_tensor([self.start])))
            answer = torch.cat((answer[: max_length - len(before) - 1], answer.new_tensor([self.end])))
            rows.append((torch.cat((before, answer)), torch.cat((torch.full_like(before, NO_LABEL), answer))))
        return rows

    def _batch(self, rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        ids = [ids for ids, _ in rows]
        mask = padded([torch.ones_like(row) for row in ids], 0)
        labels = padded([labels for _, labels in rows], NO_LABEL)
        return {"input_ids": padded(ids, self.padding["input_ids"]), "attention_mask": mask, "labels": labels}


def _special(argument: str, given: int | None, tokenizer: Tokenizer | None, of_bytes: int, *names: str) -> int:
    """The id that was given, or that of bytes, or the first of these that the tokenizer has."""
    if given is not None:
        return given
    if tokenizer is None:
        return of_bytes
    for name in names:
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise ValueError(f"{argument}: expected an id, since the tokenizer has none of {', '.join(names)}")
