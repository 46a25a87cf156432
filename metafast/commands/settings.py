"""Settings of ``train``, and those that suit a model and an algorithm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from metafast.demo.config import check_seed

BYTES = "bytes"

ADAPTS = {
    "maml": ("all", "head"),
    "fomaml": ("all", "head"),
    "reptile": ("all", "head"),
    "anil": ("head",),
    "metasgd": ("all", "head"),
    "maml++": ("all", "head"),
    "protonet": ("none",),
    "protomaml": ("all",),
}
"""The algorithms, and what the inner steps of each can adapt."""

_AT_LEAST_ONE = (
    *("ways", "shots", "queries", "steps", "tasks", "iterations"),
    *("max_length", "width", "layers", "heads"),
)
# What only one kind of model has.
_OF_BYTES, _OF_PRETRAINED = ("width", "layers", "heads"), ("trained_layers",)


@dataclass(frozen=True)
class Settings:
    """Settings of a training. A training resumes a checkpoint of the same settings alone.

    Args:
        model: ``"bytes"``, a small Transformer over bytes; or a Hugging Face model, as a folder or as a name on the hub.
        algorithm: one of :data:`ADAPTS`.
        adapt: what the inner steps adapt: ``"head"``, the head alone; ``"all"``, the head and all layers that train;
            ``"none"`` of ProtoNet, which takes no steps.
        ways, shots, queries: classes per task, texts per class to learn from, texts per class to ask about.
        steps: inner steps in training.
        tasks: tasks per meta-step.
        iterations: meta-steps.
        inner_lr, outer_lr: learning rates; the outer one falls to 0 along a cosine.
        max_length: bytes or tokens of a text that are kept.
        width, layers, heads: of the Transformer over bytes.
        trained_layers: of a Hugging Face model, the number of last layers that train. The others stay as pretrained. A
            number of at least the model's layers trains all of it, embeddings included.
        seed: seed of the split, the initial parameters and the episodes.
        text, label: names of the file's columns.

    Raises:
        TypeError, ValueError: a setting is not as described; the message names it.
    """

    model: str = BYTES
    algorithm: str = "maml"
    adapt: str = "all"
    ways: int = 5
    shots: int = 5
    queries: int = 5
    steps: int = 3
    tasks: int = 4
    iterations: int = 200
    inner_lr: float = 0.1
    outer_lr: float = 2e-3
    max_length: int = 48
    width: int = 64
    layers: int = 2
    heads: int = 4
    trained_layers: int = 1
    seed: int = 0
    text: str = "text"
    label: str = "label"

    def __post_init__(self) -> None:
        for name, kind in kinds().items():
            check_kind(name, getattr(self, name), kind)
        if self.algorithm not in ADAPTS:
            raise ValueError(f"algorithm: expected one of {', '.join(ADAPTS)}, got {self.algorithm!r}")
        if self.adapt not in ADAPTS[self.algorithm]:
            known = " or ".join(ADAPTS[self.algorithm])
            raise ValueError(f"adapt: expected {known} with {self.algorithm}, got {self.adapt!r}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("inner_lr", "outer_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        least = 1 if self.by_prototypes else 0
        if self.trained_layers < least:
            raise ValueError(
                f"trained_layers: expected at least {least} with {self.algorithm}, got {self.trained_layers}"
            )
        check_seed(self.seed)

    @property
    def pretrained(self) -> bool:
        """Whether the model is a Hugging Face model."""
        return self.model != BYTES

    @property
    def by_prototypes(self) -> bool:
        """Whether classes are told apart by prototypes, so that the number of classes is free and there is no own head."""
        return self.algorithm in ("protonet", "protomaml")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Those that are given, and for the others what suits the model and the algorithm.

        Raises:
            TypeError, ValueError: see :class:`Settings`; or a setting is of the other kind of model.
        """
        model, algorithm = given.get("model", BYTES), given.get("algorithm", cls.algorithm)
        foreign, kind = (_OF_PRETRAINED, BYTES) if model == BYTES else (_OF_BYTES, "a Hugging Face model")
        for name in foreign:
            if name in given:
                raise ValueError(f"{name}: expected no such setting with the model {kind}, got {given[name]!r}")
        return cls(**{**_suited(model, algorithm, given.get("adapt")), **given})

    def to_json(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from :meth:`to_json`. Raises ValueError where their names are not those of this version."""
        if set(values) != set(kinds()):
            raise ValueError(f"settings: expected the settings {sorted(kinds())}, got {sorted(values)}")
        return cls(**values)


def kinds() -> dict[str, type]:
    """The settings' names and types."""
    return get_type_hints(Settings)


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raises TypeError where a value is not of a setting's type. A whole number is a float, too."""
    accepted = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        expected = {int: "a whole number", float: "a number", str: "a string"}[kind]
        raise TypeError(f"{name}: expected {expected}, got {value!r}")


def _suited(model: str, algorithm: str, adapt: str | None) -> dict[str, Any]:
    """Settings that run well on a CPU, where they differ from the defaults of :class:`Settings`.

    Of a pretrained model the head alone is adapted: its body then computes each text once, whatever the number of steps.
    Reptile would train nothing but the head in this way.
    """
    can = ADAPTS.get(algorithm, ADAPTS["maml"])
    if adapt is None:
        adapt = "head" if "head" in can and model != BYTES and algorithm != "reptile" else can[0]
    # ProtoMAML's head starts where it is good already.
    suited = {"adapt": adapt, "inner_lr": 0.01 if algorithm == "protomaml" else 0.1}
    if model != BYTES:
        suited |= {"iterations": 30, "outer_lr": 1e-4, "max_length": 64}
        if adapt == "head":
            suited["inner_lr"] = 1.0
    return suited
