"""The loss of classification on the batches that :class:`metafast.tasks.FewShot` draws."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from metafast.algorithms.prototypes import inputs_of, labels_of

__all__ = ["classification_loss", "inputs_of"]


def classification_loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of one task, and its accuracy as the metric ``"accuracy"``.

    Args:
        model: ``model(inputs)`` gives logits ``[n, classes]``, or an output of Hugging Face's models with ``logits``.
        batch: a pair ``(inputs, labels)``, or a dict of inputs and ``"label"`` or ``"labels"``, int64 ``[n]``; of several
            inputs the model gets the dict.

    Raises:
        TypeError, ValueError: the batch is neither.
    """
    labels = labels_of(batch)
    output = model(inputs_of(batch))
    logits = getattr(output, "logits", output)
    accuracy = (logits.argmax(-1) == labels).to(logits.dtype).mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy}
