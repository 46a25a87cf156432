"""Settings, model, learner and loss of a run of the demo."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from metafast import inner
from metafast.algorithms import MAML, Reptile
from metafast.algorithms.learner import MetaLearner
from metafast.models import EncoderClassifier
from metafast.training import classification_loss

ALGORITHMS = ("maml", "fomaml", "reptile")


@dataclass(frozen=True)
class Config:
    """Settings of a run. A run resumes a checkpoint of the same settings alone.

    Args:
        algorithm: ``"maml"`` (second order), ``"fomaml"`` or ``"reptile"``.
        ways, shots, queries: languages per episode, names per language to learn from, names per language to ask about.
        steps: inner steps in training.
        tasks: episodes per meta-step.
        iterations: meta-steps.
        inner_lr, outer_lr: learning rates; the outer one falls to 0 along a cosine.
        width, layers, heads, max_length: of the classifier; ``max_length`` in bytes.
        seed: seed of the initial parameters and of the episodes.
        backend: ``"fused"``, ``"reference"`` or ``"auto"``; their numbers differ by rounding.
    """

    algorithm: str = "maml"
    ways: int = 5
    shots: int = 5
    queries: int = 10
    steps: int = 3
    tasks: int = 4
    iterations: int = 200
    inner_lr: float = 0.1
    outer_lr: float = 4e-3
    width: int = 64
    layers: int = 2
    heads: int = 4
    max_length: int = 24
    seed: int = 0
    backend: str = "fused"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        for name in ("ways", "shots", "queries", "steps", "tasks", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        check_seed(self.seed)

    def to_json(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Config:
        """Settings from :meth:`to_json`. Raises ValueError where their names are not those of this version."""
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ValueError(f"config: expected the settings {sorted(known)}, got {sorted(values)}")
        return cls(**values)

    def model(self, classes: int | None = None) -> EncoderClassifier:
        """A new classifier of ``classes`` classes; None: ``ways``. Its parameters depend on ``seed`` alone."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            model = EncoderClassifier(
                self.ways if classes is None else classes,
                width=self.width,
                layers=self.layers,
                heads=self.heads,
                max_length=self.max_length,
            )
            for embedding in (model.tokens, model.positions):
                nn.init.normal_(embedding.weight, std=0.1)
            # Which label a language gets is drawn anew in every episode: without adaptation no class is preferred.
            nn.init.zeros_(model.head.weight)
            nn.init.zeros_(model.head.bias)
        return model

    def learner(self, model: nn.Module, inner_lr: float | None = None) -> MetaLearner:
        """The algorithm of these settings on ``model``."""
        rule = inner.SGD(lr=self.inner_lr if inner_lr is None else inner_lr)
        if self.algorithm == "reptile":
            return Reptile(model, classification_loss, inner=rule, steps=self.steps)
        return MAML(
            model, classification_loss, inner=rule, steps=self.steps, order=1 if self.algorithm == "fomaml" else 2
        )


def check_seed(seed: int) -> None:
    """Raises ValueError where torch's generators do not accept the seed."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a number from -2**63 to 2**64 - 1, got {seed}")
