"""Few-shot episodes from labelled text ``{label: texts}``, such as a CSV file or the CLDR names."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Batch", "LabelledText", "encode", "read_csv"]

Batch = dict[str, Tensor]
"""Texts as bytes and their labels: ``{"text": int64 [..., n, max_length], "label": int64 [..., n]}``."""


def encode(texts: Sequence[str], max_length: int) -> Tensor:
    """UTF-8 bytes of texts, cut after ``max_length`` (also within a character) and padded with zeros.

    Returns:
        uint8 ``[len(texts), max_length]``.

    Raises:
        ValueError: ``max_length`` is not positive, or a text is empty or holds the byte 0, which stands for padding.
    """
    if max_length < 1:
        raise ValueError(f"max_length: expected a positive number, got {max_length}")
    rows = []
    for text in texts:
        data = text.encode()[:max_length]
        if not data or 0 in data:
            raise ValueError(f"texts: expected text without NUL characters, not empty; got {text!r}")
        rows.append(data.ljust(max_length, b"\0"))
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).reshape(len(rows), max_length).clone()


def read_csv(path: str | Path) -> dict[str, list[str]]:
    """Reads a UTF-8 CSV file with a header line and the columns ``text`` and ``label`` (others are ignored).

    Returns:
        The texts by label, both in the order of the file, each text of a label once.

    Raises:
        ValueError: a column is missing, a row has no text or no label, or there is no row at all; with the line.
        OSError: the file cannot be read.
    """
    texts: dict[str, dict[str, None]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in ("text", "label") if column not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise ValueError(
                    f"{path}: expected columns text and label; {' and '.join(missing)} missing, found {found}"
                )
            for row in reader:
                text, label = (row["text"] or "").strip(), (row["label"] or "").strip()
                if not text or not label:
                    raise ValueError(f"{path}, line {reader.line_num}: expected a text and a label, got {row}")
                texts.setdefault(label, {})[text] = None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from error
    if not texts:
        raise ValueError(f"{path}: expected at least one row, got none")
    return {label: list(of_label) for label, of_label in texts.items()}


class LabelledText:
    """Texts by label, as bytes, to draw few-shot episodes from.

    Args:
        texts: texts by label; at least one label, distinct texts within a label.
        max_length: number of bytes of a text that are kept, see :func:`encode`.

    Raises:
        ValueError: there is no label, or :func:`encode` refuses a text.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]], max_length: int) -> None:
        if not texts:
            raise ValueError("texts: expected at least one label, got none")
        self.labels = tuple(texts)
        self.encoded = tuple(encode(of_label, max_length) for of_label in texts.values())

    def sample(
        self, tasks: int, ways: int, shots: int, queries: int, generator: torch.Generator
    ) -> tuple[Batch, Batch]:
        """Draws episodes. Each has ``ways`` labels in random order, and ``shots`` + ``queries`` texts per label.

        Args:
            tasks: number of episodes.
            ways: labels per episode.
            shots: texts per label in the support set.
            queries: texts per label in the query set.
            generator: the only source of random numbers.

        Returns:
            support ``{"text": int64 [tasks, ways * shots, max_length], "label": int64 [tasks, ways * shots]}`` and
            query, likewise with ``queries``. No text is in both.

        Raises:
            ValueError: a number is not positive, there are fewer than ``ways`` labels, or a label has too few texts.
        """
        for name, number in {"tasks": tasks, "ways": ways, "shots": shots, "queries": queries}.items():
            if number < 1:
                raise ValueError(f"{name}: expected a positive number, got {number}")
        if ways > len(self.labels):
            raise ValueError(f"ways: expected at most {len(self.labels)}, the number of labels, got {ways}")
        for label, of_label in zip(self.labels, self.encoded, strict=True):
            if len(of_label) < shots + queries:
                raise ValueError(f"shots + queries: label {label!r} has {len(of_label)} texts, got {shots} + {queries}")
        drawn = torch.stack(
            [
                torch.stack(
                    [self._draw(label, shots + queries, generator) for label in self._draw_labels(ways, generator)]
                )
                for _ in range(tasks)
            ]
        )
        return _batch(drawn[:, :, :shots]), _batch(drawn[:, :, shots:])

    def _draw_labels(self, ways: int, generator: torch.Generator) -> list[int]:
        return torch.randperm(len(self.labels), generator=generator)[:ways].tolist()

    def _draw(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        of_label = self.encoded[label]
        return of_label[torch.randperm(len(of_label), generator=generator)[:count]]


def _batch(texts: Tensor) -> Batch:
    """``[tasks, ways, n, max_length]`` → texts and labels, the ways in order."""
    tasks, ways, count, _ = texts.shape
    label = torch.arange(ways).repeat_interleave(count).expand(tasks, -1)
    return {"text": texts.flatten(1, 2).long(), "label": label.contiguous()}
