"""The losses of the batches that :mod:`metafast.tasks` draws: of classification, of language models, of translation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from metafast.algorithms.prototypes import inputs_of, labels_of

__all__ = ["classification_loss", "inputs_of", "language_model_loss", "translation_loss"]


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


def language_model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the labels of one task, each predicted from the ids before it.

    The mean is over all tokens of the task; the perplexity is the exponential of it.

    Args:
        model: ``model(input_ids=…, attention_mask=…)`` gives logits ``[n, length, vocabulary]``, or an output of Hugging
            Face's models with ``logits``: :class:`metafast.models.Decoder`, GPT-2, …
        batch: ``{"input_ids", "attention_mask", "labels": int64 [n, length]}``, labels −100 where nothing is predicted, as
            :class:`metafast.tasks.Dialogue` draws it.
    """
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def translation_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the targets of one task.

    Args:
        model: ``model(input_ids=…, attention_mask=…, labels=…)`` gives logits ``[n, target, vocabulary]``, or an output of
            Hugging Face's models with ``logits``: :class:`metafast.models.EncoderDecoder`, T5, BART, …
        batch: ``{"input_ids", "attention_mask": int64 [n, source], "labels": int64 [n, target]}``, labels −100 after the
            end of a text, as :class:`metafast.tasks.Translation` draws it.
    """
    names = ("input_ids", "attention_mask", "labels")
    output = model(**{name: batch[name] for name in names})
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
