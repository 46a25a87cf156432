"""Few-shot classification: N-way K-shot episodes from any labelled examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metafast.arguments import check_positive
from metafast.tasks.examples import Examples
from metafast.tasks.reading import read_examples
from metafast.tasks.source import Episode, Tasks, generator_of, padding_id

__all__ = ["FewShot"]


class FewShot(Tasks):
    """Episodes of few-shot classification. Each has ``ways`` classes in random order, and ``shots`` + ``queries`` of each.

    A batch holds

    - of texts without a tokenizer, UTF-8 bytes: ``{"text": int64 [tasks, n, length], "label": int64 [tasks, n]}``, zeros
      after the end of a text;
    - of texts with a tokenizer: ``{"input_ids", "attention_mask": int64 [tasks, n, length], "labels": int64 [tasks, n]}``;
    - of tensors: pairs ``(x [tasks, n, …], label [tasks, n])``.

    Args:
        examples: whatever :func:`metafast.tasks.read_examples` reads.
        ways, shots, queries: classes per episode, examples per class in the support set and in the query set.
        tokenizer: a callable as Hugging Face's tokenizers are: ``tokenizer(texts, truncation=True, max_length=…)`` gives
            ``"input_ids"``, a list of ids per text; None: bytes.
        max_length: bytes or ids of a text that are kept.
        shuffle: whether classes are drawn in random order, so that what a label means changes with every episode; False:
            in the order of ``labels``. With all classes as ``ways``, that is joint training.
        seed, multiple: as for :class:`metafast.tasks.Tasks`.

    Attributes:
        labels: names of the classes.

    Raises:
        ValueError: there are fewer classes than ``ways``, or a class has too few examples; a text holds the byte 0; tensors
            have several shapes.
        TypeError: an example is neither a text nor a tensor.
    """

    def __init__(
        self,
        examples: Any,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 10,
        tokenizer: Callable[..., Any] | None = None,
        max_length: int = 64,
        shuffle: bool = True,
        seed: int = 0,
        multiple: int = 1,
    ) -> None:
        super().__init__(seed, multiple)
        examples = read_examples(examples)
        self.ways = check_positive("ways", ways)
        self.shots = check_positive("shots", shots)
        self.queries = check_positive("queries", queries)
        check_positive("max_length", max_length)
        self.labels = tuple(examples)
        self.shuffle = shuffle
        if len(examples) < ways:
            raise ValueError(f"ways: expected at most {len(examples)}, the number of classes, got {ways}")
        few = [f"{label!r} has {len(of)}" for label, of in examples.items() if len(of) < shots + queries]
        if few:
            raise ValueError(
                f"shots + queries: expected at least {shots} + {queries} examples of every class; {', '.join(few[:8])}"
                f"{f' and {len(few) - 8} more' if len(few) > 8 else ''}; remove these classes or ask for fewer"
            )
        self.tokenizer = tokenizer
        self._encoded = encode_examples(examples, tokenizer, max_length)
        self._texts = isinstance(examples[self.labels[0]][0], str)
        if not self._texts:
            # The last dimension of a tensor is no length.
            self.multiple = 1
        if tokenizer is not None:
            self.padding = {"input_ids": padding_id(tokenizer)}

    def __getitem__(self, number: int) -> Episode:
        """Episode ``number``: support and query of one task, without the task dimension."""
        generator = generator_of(self.seed, number)
        support: list[list[Tensor]] = []
        query: list[list[Tensor]] = []
        ways = torch.randperm(len(self.labels), generator=generator)[: self.ways].tolist()
        for way in ways if self.shuffle else sorted(ways):
            of_label = self._encoded[way]
            drawn = torch.randperm(len(of_label), generator=generator)[: self.shots + self.queries].tolist()
            support.append([of_label[n] for n in drawn[: self.shots]])
            query.append([of_label[n] for n in drawn[self.shots :]])
        return Episode(self._batch(support), self._batch(query))

    def _batch(self, by_way: Sequence[Sequence[Tensor]]) -> Any:
        rows = [row for of_way in by_way for row in of_way]
        labels = torch.arange(len(by_way)).repeat_interleave(len(by_way[0]))
        if not self._texts:
            return torch.stack(rows), labels
        return text_batch(rows, labels, self.padding.get("input_ids", 0), bytewise=self.tokenizer is None)


def encode_examples(
    examples: Examples | Mapping[str, Sequence[Any]], tokenizer: Callable[..., Any] | None, max_length: int
) -> tuple[list[Tensor], ...]:
    """The examples of every label as tensors: bytes (uint8), token ids (int32), or the tensors that they are.

    Raises:
        TypeError, ValueError: see :class:`FewShot`.
    """
    encoded = []
    for label, of_label in examples.items():
        kinds = {type(example) for example in of_label}
        if kinds == {str}:
            encoded.append(_texts(label, of_label, tokenizer, max_length))
        elif all(issubclass(kind, Tensor) for kind in kinds):
            shapes = {tuple(example.shape) for example in of_label}
            if len(shapes) > 1:
                raise ValueError(f"examples: expected tensors of one shape, got {sorted(shapes)} of {label!r}")
            encoded.append(list(of_label))
        else:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"examples: expected texts or tensors, got {names} of {label!r}")
    return tuple(encoded)


def text_batch(rows: Sequence[Tensor], labels: Tensor, padding: int, *, bytewise: bool) -> dict[str, Tensor]:
    """Encoded texts as the batch of one task, padded to the longest of them."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=padding).long()
    if bytewise:
        return {"text": ids, "label": labels}
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _texts(label: str, texts: Sequence[str], tokenizer: Callable[..., Any] | None, max_length: int) -> list[Tensor]:
    if tokenizer is None:
        rows = [text.encode()[:max_length] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row or 0 in row:
                raise ValueError(
                    f"examples: expected text without NUL characters, not empty; got {text!r} of {label!r}"
                )
        return [torch.frombuffer(bytearray(row), dtype=torch.uint8) for row in rows]
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    empty = [text for text, row in zip(texts, ids, strict=True) if not len(row)]
    if empty:
        raise ValueError(f"tokenizer: expected ids of every text, got none of {empty[0]!r} of {label!r}")
    return [torch.tensor(row, dtype=torch.int32) for row in ids]
