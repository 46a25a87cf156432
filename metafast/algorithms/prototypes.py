"""Class means of embedded support sets, which ProtoNet and ProtoMAML share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metafast.engine.task_batch import Params

Part: TypeAlias = Callable[[Any], Any]


def inputs_of(batch: Any) -> Any:
    """The first of a pair ``(inputs, labels)``; a dict without its ``"label"`` or ``"labels"``, or its only other entry."""
    if not isinstance(batch, Mapping):
        return _pair(batch)[0]
    inputs = {name: value for name, value in batch.items() if name != _label_key(batch)}
    return next(iter(inputs.values())) if len(inputs) == 1 else inputs


def labels_of(batch: Any) -> Tensor:
    """The classes of a pair ``(inputs, labels)`` or of a dict of inputs and ``"label"`` or ``"labels"``."""
    return batch[_label_key(batch)] if isinstance(batch, Mapping) else _pair(batch)[1]


def _label_key(batch: Mapping[str, Any]) -> str:
    found = [key for key in ("label", "labels") if key in batch]
    if len(found) != 1 or len(batch) < 2:
        raise ValueError(
            "batch: expected inputs and 'label' or 'labels', or else the arguments inputs and labels that say what is "
            f"what; got {', '.join(map(repr, batch))}"
        )
    return found[0]


def _pair(batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            "batch: expected a pair (inputs, labels) or a dict of both, or else the arguments inputs and labels that say "
            f"what is what; got {type(batch).__name__}"
        )
    return batch


def check_ways(ways: int) -> int:
    """Returns ``ways``. Raises TypeError or ValueError where it is no number of classes."""
    if isinstance(ways, bool) or not isinstance(ways, int):
        raise TypeError(f"ways: expected an int, got {type(ways).__name__}")
    if ways < 1:
        raise ValueError(f"ways: expected at least 1, got {ways}")
    return ways


class Prototypes(nn.Module):
    """c_k, the mean embedding of class k's support examples (Snell, Swersky and Zemel, NIPS 2017, equation 1).

    Args:
        model: embeds inputs ``[n, …]`` as ``[n, d]``.
        ways: number of classes.
        inputs, labels: functions that give the inputs and the labels ``[n]`` of a batch; labels count from 0.
    """

    def __init__(self, model: nn.Module, ways: int, inputs: Part, labels: Part) -> None:
        super().__init__()
        self.model = model
        self._ways = ways
        self._inputs = inputs
        self._labels = labels

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The means ``[ways, d]``, and for each class whether it has examples, ``[ways]``."""
        embedded = self.model(self._inputs(batch))
        if embedded.ndim != 2:
            raise ValueError(f"model: expected embeddings [examples, size], got shape {tuple(embedded.shape)}")
        labels = self._labels(batch)
        members = (labels == torch.arange(self._ways, device=labels.device).unsqueeze(1)).to(embedded.dtype)
        counts = members.sum(1)
        return members @ embedded / counts.clamp(min=1).unsqueeze(1), counts > 0


def of_body(params: Params) -> Params:
    """An embedding's parameters by their names in a classifier whose attribute ``body`` is the embedding."""
    return {f"body.{name}": p for name, p in params.items()}
