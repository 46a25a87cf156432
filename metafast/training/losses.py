"""The loss of classification on the batches that :class:`metafast.tasks.FewShot` draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["classification_loss", "inputs_of"]

LABELS = ("label", "labels")


def inputs_of(batch: Any) -> Any:
    """What a model is called with: the first of a pair; a dict without ``"label"`` or ``"labels"``, or its one entry.

    It is the ``inputs=`` of :class:`metafast.ProtoNet` and :class:`metafast.ProtoMAML` for tokenized batches.
    """
    if not isinstance(batch, Mapping):
        return batch[0]
    inputs = {name: leaf for name, leaf in batch.items() if name not in LABELS}
    return next(iter(inputs.values())) if len(inputs) == 1 else inputs


def classification_loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of one task, and its accuracy as the metric ``"accuracy"``.

    Args:
        model: ``model(inputs)`` gives logits ``[n, classes]``, or an output of Hugging Face's models with ``logits``.
        batch: a pair ``(inputs, labels)``, or a dict of inputs and ``"label"`` or ``"labels"``, int64 ``[n]``.
    """
    labels = next(batch[name] for name in LABELS if name in batch) if isinstance(batch, Mapping) else batch[1]
    output = model(inputs_of(batch))
    logits = getattr(output, "logits", output)
    accuracy = (logits.argmax(-1) == labels).to(logits.dtype).mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy}
