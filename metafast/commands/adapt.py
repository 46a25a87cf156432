"""``python -m metafast adapt``: a trained checkpoint on other languages, or on somebody's own labelled text."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, fields

import torch

from metafast.demo.config import check_seed
from metafast.demo.files import Folder, load_model, read_settings
from metafast.tasks.text import encode


@dataclass(frozen=True)
class Example:
    """A text that was held back, its label, and the predictions before and after adaptation."""

    text: str
    label: str
    before: str
    after: str


def adapt(
    folder: Folder, texts: dict[str, list[str]], *, shots: int | None = None, steps: int = 10, seed: int = 0
) -> list[Example]:
    """Adapts a checkpoint to some of ``texts`` and predicts the labels of the others.

    Args:
        folder: a run of the demo.
        texts: from label to its texts; at most as many labels as the checkpoint has ways, more than ``shots`` texts each.
        shots: texts of each label to learn from, drawn at random; None takes the checkpoint's.
        steps: inner steps.
        seed: seed of the draw.

    Raises:
        ValueError: the folder holds no such checkpoint, or another argument is not as described.
    """
    config, _ = read_settings(folder)
    model = config.model()
    load_model(folder, model)
    shots = config.shots if shots is None else shots
    check_seed(seed)
    if shots < 1 or steps < 0:
        raise ValueError(f"shots, steps: expected at least 1 and 0, got {shots} and {steps}")
    labels = list(texts)
    if not 2 <= len(labels) <= config.ways:
        raise ValueError(
            f"labels: expected 2 to {config.ways}, as many as the checkpoint tells apart, got {len(labels)}"
        )
    for label, of_label in texts.items():
        if len(of_label) <= shots:
            raise ValueError(f"shots: expected fewer than the {len(of_label)} texts of {label!r}, got {shots}")

    generator = torch.Generator().manual_seed(seed)
    drawn = {
        label: [found[i] for i in torch.randperm(len(found), generator=generator)] for label, found in texts.items()
    }
    learned = [(text, label) for label in labels for text in drawn[label][:shots]]
    asked = [(text, label) for label in labels for text in drawn[label][shots:]]
    support = {
        "text": encode([text for text, _ in learned], config.max_length).long()[None],
        "label": torch.tensor([labels.index(label) for _, label in learned])[None],
    }
    query = encode([text for text, _ in asked], config.max_length).long()[None]
    meta = config.learner(model)
    predictions = []
    with torch.no_grad():
        for count in (0, steps):
            logits = meta.adapt(support, steps=count)(query)[0, :, : len(labels)]
            predictions.append([labels[i] for i in logits.argmax(-1)])
    return [Example(text, label, *found) for (text, label), *found in zip(asked, *predictions, strict=True)]


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
