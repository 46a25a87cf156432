"""A small Transformer encoder that classifies sequences of bytes or tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast.arguments import check_positive

__all__ = ["Encoder", "EncoderClassifier"]

PADDING = 0


class EncoderLayer(nn.Module):
    """Pre-LN Transformer layer (Xiong et al. 2020, arXiv:2002.04745): self-attention, then a GELU network.

    Args:
        width: size of a position's vector, a multiple of ``heads``.
        heads: number of attention heads.
        hidden: width of the GELU network.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_network = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x``: ``[n, length, width]``; ``mask``: bool ``[n, 1, 1, length]``, True where a key may be attended to."""
        query, key, value = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_network(x))))


class Encoder(nn.Module):
    """Embeds tokens and positions and applies pre-LN Transformer layers.

    Everything is plain torch: ``F.scaled_dot_product_attention`` with padding as a boolean mask, no dropout, no
    data-dependent control flow, so that it runs under ``torch.func`` and can be differentiated twice where the
    attention can.

    Args:
        vocabulary: number of token ids; id 0 is padding, ignored by attention and by the average.
        width, layers, heads: size of a position's vector, number of layers, attention heads per layer.
        max_length: longest sequence.

    Raises:
        ValueError: a size is not positive, or ``width`` is not a multiple of ``heads``.
    """

    def __init__(
        self, *, vocabulary: int = 256, width: int = 64, layers: int = 2, heads: int = 4, max_length: int = 32
    ) -> None:
        super().__init__()
        check_sizes(vocabulary=vocabulary, width=width, layers=layers, heads=heads, max_length=max_length)
        self.max_length = max_length
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(max_length, width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, 2 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states of sequences.

        Args:
            input_ids: int64 ``[n, length]`` token ids, ``length`` ≤ ``max_length``.
            attention_mask: ``[n, length]``, not 0 where there is a token; None: where the id is not 0.

        Returns:
            ``[n, length, width]``, after the last layer normalisation.

        Raises:
            ValueError: ``input_ids`` has another rank or is too long.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"input_ids: expected [n, length] with length <= {self.max_length}, got {list(input_ids.shape)}"
            )
        real = input_ids != PADDING if attention_mask is None else attention_mask != 0
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x, real[:, None, None, :])
        return self.norm(x)


def check_sizes(*, width: int, heads: int, **others: int) -> None:
    """Raises TypeError or ValueError where a size is no positive int, or ``width`` is not a multiple of ``heads``."""
    for name, size in {"width": width, "heads": heads, **others}.items():
        check_positive(name, size)
    if width % heads:
        raise ValueError(f"width: expected a multiple of heads = {heads}, got {width}")


class EncoderClassifier(Encoder):
    """An :class:`Encoder` of bytes or tokens whose outputs are averaged over the tokens and classified.

    Args:
        classes: number of logits.
        sizes: as for :class:`Encoder`; id 0 is padding, ignored by attention and by the average.

    Raises:
        ValueError: a size is not positive, or ``width`` is not a multiple of ``heads``.
    """

    def __init__(self, classes: int, **sizes: int) -> None:
        check_positive("classes", classes)
        super().__init__(**sizes)
        self.head = nn.Linear(self.norm.normalized_shape[0], classes)

    def forward(self, text: Tensor) -> Tensor:  # type: ignore[override]
        """Classifies sequences.

        Args:
            text: int64 ``[n, length]`` token ids, ``length`` ≤ ``max_length``, zeros after the end of a sequence.

        Returns:
            logits ``[n, classes]``. A sequence of padding alone is classified by the bias of the head.

        Raises:
            ValueError: ``text`` has another rank or is too long.
        """
        if text.dim() != 2 or text.shape[1] > self.max_length:
            raise ValueError(f"text: expected [n, length] with length <= {self.max_length}, got {list(text.shape)}")
        states = super().forward(text)
        weights = (text != PADDING).to(states.dtype)
        pooled = torch.einsum("nlw,nl->nw", states, weights) / weights.sum(1, keepdim=True).clamp(min=1)
        return self.head(pooled)
