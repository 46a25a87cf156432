"""Pairs of texts as tensors: a source and its target, which translation and dialogue learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["END", "NO_LABEL", "START", "Pair", "check_pairs", "encode_texts", "padded"]

Pair = tuple[str, str]
Tokenizer = Callable[..., Any]

START, END = 2, 3
"""The control characters "start of text" and "end of text", which bytes of a target are enclosed in."""
NO_LABEL = -100
"""What Hugging Face's models and torch's cross entropy take for no label."""


def check_pairs(name: str, pairs: Mapping[str, Sequence[Pair]], least: int) -> dict[str, list[Pair]]:
    """The pairs by task.

    Args:
        name: the argument's name in messages.
        pairs: pairs by the name of their task.
        least: number of pairs that a task needs.

    Raises:
        TypeError: it is no mapping to pairs of texts.
        ValueError: there is no task, a task has too few pairs, or a text is empty.
    """
    if not isinstance(pairs, Mapping):
        raise TypeError(f"{name}: expected a mapping from task to pairs of texts, got {type(pairs).__name__}")
    if not pairs:
        raise ValueError(f"{name}: expected at least one task, got none")
    checked = {}
    for task, of_task in pairs.items():
        checked[task] = [_checked(f"{name}[{task!r}][{n}]", pair) for n, pair in enumerate(of_task)]
        if len(checked[task]) < least:
            raise ValueError(
                f"{name}: expected at least {least} pairs of every task, {task!r} has {len(checked[task])}"
            )
    return checked


def _checked(place: str, pair: Any) -> Pair:
    if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
        raise TypeError(f"{place}: expected a pair of texts, got {pair!r}")
    source, target = pair
    if not source.strip() or not target.strip():
        raise ValueError(f"{place}: expected texts that are not empty, got {pair!r}")
    return source, target


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer | None, max_length: int, **options: Any) -> list[Tensor]:
    """The ids of every text, int32: the tokenizer's, or UTF-8 bytes.

    Args:
        texts: not empty.
        tokenizer: as Hugging Face's tokenizers are called; None: bytes.
        max_length: ids that are kept.
        options: of the tokenizer.

    Raises:
        ValueError: a text holds one of the characters 0, 2, 3, which bytes are padded with and enclosed in.
    """
    if tokenizer is not None:
        found = tokenizer(list(texts), truncation=True, max_length=max_length, **options)["input_ids"]
        return [torch.tensor(list(ids), dtype=torch.int32) for ids in found]
    rows = [text.encode()[:max_length] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if {0, START, END} & {*row}:
            raise ValueError(f"texts: expected text without the control characters 0, 2 and 3, got {text!r}")
    return [torch.tensor(list(row), dtype=torch.int32) for row in rows]


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """int64 ``[n, length]``, padded at the end to the longest row."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value).long()
