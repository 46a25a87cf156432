"""A trained model on other classes: some of their texts are learned from, the labels of the others are predicted."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from metafast.commands.trained import Trained
from metafast.demo.config import check_seed
from metafast.demo.files import Folder
from metafast.engine.learners import Learners
from metafast.tasks.few_shot import encode_examples, text_batch
from metafast.tasks.source import padding_id
from metafast.training.losses import inputs_of

# Texts that are classified at once.
AT_ONCE = 64


@dataclass(frozen=True)
class Example:
    """A text that was held back, its label, and the predictions before and after adaptation."""

    text: str
    label: str
    before: str
    after: str


def adapt(
    folder: Folder,
    texts: Mapping[str, Sequence[str]],
    *,
    shots: int | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> list[Example]:
    """Adapts a checkpoint to some of ``texts`` and predicts the labels of the others.

    Args:
        folder: of ``train`` or of ``demo``.
        texts: from label to its texts, more than ``shots`` of each; at most as many labels as the checkpoint has ways, but
            any number with prototypes.
        shots: texts of each label to learn from, drawn at random; None takes the checkpoint's.
        steps: inner steps; None takes the checkpoint's.
        seed: seed of the draw.

    Raises:
        ValueError: the folder holds no such checkpoint, or another argument is not as described.
    """
    trained = Trained.read(folder)
    shots = trained.shots if shots is None else shots
    steps = trained.steps if steps is None else steps
    check_seed(seed)
    if shots < 1 or steps < 0:
        raise ValueError(f"shots, steps: expected at least 1 and 0, got {shots} and {steps}")
    labels = list(texts)
    if len(labels) < 2 or (len(labels) > trained.ways and not trained.more_ways):
        expected = "or more" if trained.more_ways else f"to {trained.ways}, as many as the checkpoint tells apart"
        raise ValueError(f"labels: expected 2 {expected}, got {len(labels)}")
    for label, of_label in texts.items():
        if len(of_label) <= shots:
            raise ValueError(f"shots: expected fewer than the {len(of_label)} texts of {label!r}, got {shots}")

    generator = torch.Generator().manual_seed(seed)
    drawn = {
        label: [found[i] for i in torch.randperm(len(found), generator=generator)] for label, found in texts.items()
    }
    asked = [(text, label) for label in labels for text in drawn[label][shots:]]
    encoded = encode_examples(drawn, trained.tokenizer, trained.max_length)
    learned = [row for rows in encoded for row in rows[:shots]]
    support = _batch(trained, learned, torch.arange(len(labels)).repeat_interleave(shots))
    queries = [row for rows in encoded for row in rows[shots:]]
    meta = trained.learner(len(labels) if trained.more_ways else trained.ways)
    found = {count: _predicted(trained, meta.adapt(support, count), queries, len(labels)) for count in {0, steps}}
    before, after = ([labels[i] for i in found[count]] for count in (0, steps))
    return [Example(*example, *predicted) for example, *predicted in zip(asked, before, after, strict=True)]


def to_csv(examples: list[Example]) -> str:
    """A line per example: the text, its label, the predictions before and after adaptation."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([field.name for field in fields(Example)])
    writer.writerows([example.text, example.label, example.before, example.after] for example in examples)
    return lines.getvalue()


def table(examples: list[Example], show: int) -> str:
    """Some examples of each label, and the accuracy before and after."""
    lines = []
    width = max(len(example.label) for example in examples)
    for label in dict.fromkeys(example.label for example in examples):
        for example in [e for e in examples if e.label == label][:show]:
            mark = "✓" if example.after == label else "✗"
            predicted = f"before: {example.before:<{width}}  after: {example.after:<{width}}"
            lines.append(f"{mark} {label:<{width}}  {predicted}  {example.text}")
    before, after = (sum(getattr(e, when) == e.label for e in examples) / len(examples) for when in ("before", "after"))
    lines.append(f"\naccuracy on {len(examples)} texts: {before:.3f} before, {after:.3f} after")
    return "\n".join(lines)


def _predicted(trained: Trained, learners: Learners, rows: Sequence[Tensor], count: int) -> list[int]:
    """The number of the likeliest of ``count`` classes for each encoded text."""
    found: list[int] = []
    with torch.no_grad():
        for first in range(0, len(rows), AT_ONCE):
            chunk = rows[first : first + AT_ONCE]
            inputs = inputs_of(_batch(trained, chunk, torch.zeros(len(chunk), dtype=torch.long)))
            found += learners(inputs)[0, :, :count].argmax(-1).tolist()
    return found


def _batch(trained: Trained, rows: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """One task of encoded texts."""
    padding = padding_id(trained.tokenizer)
    batch = text_batch(rows, labels, padding, bytewise=trained.tokenizer is None)
    return {name: leaf[None] for name, leaf in batch.items()}
