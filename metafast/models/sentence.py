"""A classifier of sentences on any encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SentenceClassifier"]


class SentenceClassifier(nn.Module):
    """The mean of an encoder's outputs over the tokens of a sentence, and a linear head.

    ::

        model = SentenceClassifier(encoder, classes=5)  # for MAML and the like; ANIL(..., head="head.*")
        body = SentenceClassifier(encoder)  # for ProtoNet and ProtoMAML

    Args:
        encoder: ``encoder(input_ids=…, attention_mask=…)`` gives hidden states ``[n, length, width]``: a tensor, or an
            output of Hugging Face's models with ``last_hidden_state``.
        classes: number of logits; None: no head, the output is the sentence's vector ``[n, width]``.
        width: size of the hidden states; None: ``encoder.config.hidden_size``.
        normalize: whether the sentence's vector gets the norm ``scale``, as sentence-transformers' models were trained with
            norm 1.
        scale: that norm.
        padding: the id that is not a token, where no mask is given.

    The head starts at 0: which label a class gets is drawn anew in every task, and without adaptation none is preferred.

    Raises:
        TypeError: ``encoder`` is no module.
        ValueError: the width is not known, or a size is not positive.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: int | None = None,
        *,
        width: int | None = None,
        normalize: bool = False,
        scale: float = 1.0,
        padding: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
        size: Any = width if width is not None else getattr(getattr(encoder, "config", None), "hidden_size", None)
        if not isinstance(size, int):
            raise ValueError("width: expected the size of the encoder's hidden states, which has no config.hidden_size")
        for name, number in {"width": size, "classes": 1 if classes is None else classes, "scale": scale}.items():
            if number <= 0:
                raise ValueError(f"{name}: expected a positive number, got {number}")
        self.encoder = encoder
        self.normalize = normalize
        self.scale = scale
        self.padding = padding
        self.head = nn.Identity() if classes is None else nn.Linear(size, classes)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The sentence's vectors ``[n, width]``; zeros for one without tokens."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        states = getattr(states, "last_hidden_state", states)
        weights = attention_mask.to(states.dtype).unsqueeze(-1)
        pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return F.normalize(pooled, dim=-1) * self.scale if self.normalize else pooled

    def forward(self, input_ids: Tensor | Mapping[str, Tensor], attention_mask: Tensor | None = None) -> Tensor:
        """Classifies sentences.

        Args:
            input_ids: int64 ``[n, length]``, or a batch: a dict of ``"input_ids"`` and perhaps ``"attention_mask"``, whose
                other entries are not used.
            attention_mask: ``[n, length]``, 1 where there is a token; None: where ``input_ids`` is not ``padding``.

        Returns:
            logits ``[n, classes]``, or without a head vectors ``[n, width]``.
        """
        if isinstance(input_ids, Mapping):
            batch = input_ids
            input_ids, attention_mask = batch["input_ids"], batch.get("attention_mask", attention_mask)
        if attention_mask is None:
            attention_mask = (input_ids != self.padding).long()
        return self.head(self.embed(input_ids, attention_mask))
