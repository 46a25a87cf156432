"""Low-resource translation: a task is a language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metafast.arguments import check_positive
from metafast.tasks.pairs import END, NO_LABEL, Pair, Tokenizer, check_pairs, encode_texts, padded
from metafast.tasks.source import Episode, Tasks, generator_of, in_turn, padding_id

__all__ = ["Translation"]


class Translation(Tasks):
    """Episodes of translation. Each is of one language: ``shots`` pairs to learn from and ``queries`` others.

    A batch is what Hugging Face's encoder–decoders are trained with: ``{"input_ids", "attention_mask": int64 [tasks, n,
    source], "labels": int64 [tasks, n, target]}``, −100 after the end of a target.

    Args:
        pairs: pairs of source and target by language.
        queries_from: pairs of the same languages that query sets are drawn from, with other sources; None: ``pairs``,
            without those of the support set.
        shots, queries: pairs in the support set and in the query set.
        tokenizer: as Hugging Face's tokenizers are called; it adds what ends a text. None: bytes, with the byte 3 at the end
            of a target.
        max_length: ids of a text that are kept, without the end that bytes are given.
        seed, multiple: as for :class:`metafast.tasks.Tasks`.

    Attributes:
        languages: names of the tasks.

    Raises:
        TypeError: pairs are not as described.
        ValueError: a language has too few pairs, a text is empty, or a source is among both kinds of pairs.
    """

    def __init__(
        self,
        pairs: Mapping[str, Sequence[Pair]],
        *,
        queries_from: Mapping[str, Sequence[Pair]] | None = None,
        shots: int = 16,
        queries: int = 16,
        tokenizer: Tokenizer | None = None,
        max_length: int = 64,
        seed: int = 0,
        multiple: int = 1,
    ) -> None:
        super().__init__(seed, multiple)
        self.shots = check_positive("shots", shots)
        self.queries = check_positive("queries", queries)
        check_positive("max_length", max_length)
        least = shots if queries_from is not None else shots + queries
        checked = check_pairs("pairs", pairs, least)
        self.languages = tuple(checked)
        self.padding = {"input_ids": padding_id(tokenizer), "labels": NO_LABEL}
        self._bytewise = tokenizer is None
        self._pairs = {name: self._encoded(of, tokenizer, max_length) for name, of in checked.items()}
        self._others = None
        if queries_from is not None:
            if set(queries_from) != set(pairs):
                raise ValueError(
                    f"queries_from: expected pairs of {', '.join(pairs)}, got pairs of {', '.join(queries_from)}"
                )
            others = check_pairs("queries_from", queries_from, queries)
            for name, of in others.items():
                if both := {source for source, _ in of} & {source for source, _ in checked[name]}:
                    raise ValueError(f"queries_from: expected other sources than in pairs, both have {min(both)!r}")
            self._others = {name: self._encoded(of, tokenizer, max_length) for name, of in others.items()}

    def language_of(self, number: int) -> str:
        """The language of an episode. Languages take turns, in an order that each round draws anew."""
        return in_turn(self.languages, self.seed, number)

    def __getitem__(self, number: int) -> Episode:
        """Episode ``number``: support and query of one language, without the task dimension."""
        generator = generator_of(self.seed, number)
        language = self.language_of(number)
        pairs = self._pairs[language]
        order = torch.randperm(len(pairs), generator=generator).tolist()
        support, rest = order[: self.shots], order[self.shots : self.shots + self.queries]
        if self._others is None:
            return Episode(self._batch([pairs[n] for n in support]), self._batch([pairs[n] for n in rest]))
        others = self._others[language]
        query = torch.randperm(len(others), generator=generator)[: self.queries].tolist()
        return Episode(self._batch([pairs[n] for n in support]), self._batch([others[n] for n in query]))

    def _encoded(
        self, pairs: Sequence[Pair], tokenizer: Tokenizer | None, max_length: int
    ) -> list[tuple[Tensor, Tensor]]:
        sources = encode_texts([source for source, _ in pairs], tokenizer, max_length)
        targets = encode_texts([target for _, target in pairs], tokenizer, max_length)
        if self._bytewise:
            targets = [torch.cat((target, target.new_tensor([END]))) for target in targets]
        return list(zip(sources, targets, strict=True))

    def _batch(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        sources = [source for source, _ in pairs]
        mask = padded([torch.ones_like(source) for source in sources], 0)
        labels = padded([target for _, target in pairs], NO_LABEL)
        return {"input_ids": padded(sources, self.padding["input_ids"]), "attention_mask": mask, "labels": labels}
