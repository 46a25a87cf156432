"""A small Transformer decoder: a language model of bytes or tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast.models.classifier import check_sizes
from metafast.models.generation import search

__all__ = ["Cache", "Decoder", "DecoderLayer"]

Cache = list[Tensor]
"""Keys and values of a layer: of the positions so far, and where it attends to an encoder, of the encoder's positions."""


class DecoderLayer(nn.Module):
    """Pre-LN Transformer layer (Xiong et al. 2020, arXiv:2002.04745) of a decoder.

    Causal self-attention, perhaps attention to an encoder's states, then a GELU network.

    Args:
        width: size of a position's vector, a multiple of ``heads``.
        heads: number of attention heads.
        hidden: width of the GELU network.
        attends_encoder: whether there is attention to an encoder's states.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, attends_encoder: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attends_encoder = attends_encoder
        if attends_encoder:
            self.norm_encoder = nn.LayerNorm(width)
            self.encoder_query = nn.Linear(width, width)
            self.encoder_kv = nn.Linear(width, 2 * width)
            self.encoder_out = nn.Linear(width, width)
        self.norm_network = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: Cache | None = None,
        encoded: Tensor | None = None,
        encoded_mask: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Hidden states and cache after the layer.

        Args:
            x: ``[n, length, width]``.
            mask: bool, broadcast to ``[n, heads, length, keys]``, True where a key may be attended to; None: causal, and
                nothing before ``x``.
            cache: what the call for the positions before returned.
            encoded: the encoder's states ``[n, source, width]``; not needed with a cache.
            encoded_mask: bool ``[n, 1, 1, source]``, True where there is a token.
        """
        query, key, value = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = torch.cat((cache[0], key), 2), torch.cat((cache[1], value), 2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        new = [key, value]
        if self.attends_encoder:
            if cache is None:
                new += self.encoder_kv(encoded).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
            else:
                new += cache[2:]
            query = self.encoder_query(self.norm_encoder(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            attended = F.scaled_dot_product_attention(query, new[2], new[3], attn_mask=encoded_mask)
            x = x + self.encoder_out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_network(x)))), new


class Decoder(nn.Module):
    """A language model: every position predicts the next id.

    Everything is plain torch without dropout and without control flow that depends on data, as in
    :class:`metafast.models.Encoder`.

    Args:
        vocabulary: number of ids.
        width, layers, heads: size of a position's vector, number of layers, attention heads per layer.
        max_length: longest sequence.
        end, padding: ids that end a text and that fill a batch, for :meth:`generate`.

    Raises:
        ValueError: a size is not positive, or ``width`` is not a multiple of ``heads``.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 256,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        max_length: int = 128,
        end: int = 3,
        padding: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(vocabulary=vocabulary, width=width, layers=layers, heads=heads, max_length=max_length)
        self.max_length = max_length
        self.end, self.padding = end, padding
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(max_length, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, 4 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        start_embeddings(self.tokens, self.positions)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the id that follows each position.

        Args:
            input_ids: int64 ``[n, length]``, ``length`` ≤ ``max_length``.
            attention_mask: ``[n, length]``, not 0 where there is a token. Positions count from the first token, so that
                padding may be on either side. None: all are tokens, or padding is at the end, where no token sees it.

        Returns:
            ``[n, length, vocabulary]``.

        Raises:
            ValueError: ``input_ids`` has another rank or is too long.
        """
        return self.head(self._states(input_ids, attention_mask)[0])

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Tensor:
        """Continues texts, greedily or by beam search, with a cache of keys and values.

        Args:
            input_ids: int64 ``[n, length]``, padded at the beginning, if at all.
            attention_mask: ``[n, length]``, not 0 where there is a token; None: all are.
            max_new_tokens: most ids that are added.
            num_beams, length_penalty: hypotheses per text, and how they compare (:func:`metafast.models.generation.search`).

        Returns:
            int64 ``[n, length + new]``: ``input_ids``, then new ids, ``padding`` after ``end``.

        Raises:
            ValueError: the texts would become too long, or the last id of one is padding.
        """
        length = input_ids.shape[1]
        if length + max_new_tokens > self.max_length:
            raise ValueError(
                f"max_new_tokens: expected at most {self.max_length - length} after {length} ids, got {max_new_tokens}"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not mask[:, -1].all():
            raise ValueError("attention_mask: expected padding at the beginning of texts, got some at the end")

        def step(ids: Tensor, cache: tuple[Tensor, list[Cache]] | None) -> tuple[Tensor, tuple[Tensor, list[Cache]]]:
            seen = mask if cache is None else F.pad(cache[0], (0, 1), value=1)
            states, layers = self._states(ids, seen, None if cache is None else cache[1])
            return self.head(states[:, -1]), (seen, layers)

        return search(
            step,
            input_ids,
            None,
            end=self.end,
            padding=self.padding,
            max_new_tokens=max_new_tokens,
            beams=num_beams,
            length_penalty=length_penalty,
        )

    def _states(
        self, input_ids: Tensor, attention_mask: Tensor | None, caches: list[Cache] | None = None
    ) -> tuple[Tensor, list[Cache]]:
        """Hidden states of ``input_ids`` after the last layer normalisation, and caches; the mask is of all positions."""
        if input_ids.dim() != 2 or input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"input_ids: expected [n, length] with length <= {self.max_length}, got {list(input_ids.shape)}"
            )
        length = input_ids.shape[1]
        if attention_mask is None:
            mask, positions = None, torch.arange(length, device=input_ids.device)
        else:
            real = attention_mask != 0
            mask, positions = causal_mask(real, length), (real.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        x = self.tokens(input_ids) + self.positions(positions)
        x, new = through(self.layers, x, mask, caches)
        return self.norm(x), new


def through(
    layers: nn.ModuleList, x: Tensor, mask: Tensor | None, caches: list[Cache] | None, *encoder: Tensor
) -> tuple[Tensor, list[Cache]]:
    """Hidden states and caches after all layers; ``encoder`` is an encoder's states and mask."""
    new = []
    before: Sequence[Cache | None] = caches or [None] * len(layers)
    for layer, cache in zip(layers, before, strict=True):
        x, kept = layer(x, mask, cache, *encoder)
        new.append(kept)
    return x, new


def start_embeddings(tokens: nn.Embedding, positions: nn.Embedding) -> None:
    """Initial values: what an id is weighs more than where it is, and both less than by torch's default."""
    nn.init.normal_(tokens.weight, std=0.3)
    nn.init.normal_(positions.weight, std=0.05)


def causal_mask(real: Tensor, length: int) -> Tensor:
    """What the last ``length`` of all positions may attend to.

    Args:
        real: bool ``[n, keys]``, True where there is a token.
        length: number of queries, the last of the positions.

    Returns:
        bool ``[n, 1, length, keys]``: tokens that are not after the query.
    """
    keys = real.shape[1]
    order = torch.arange(keys, device=real.device)
    return (order <= order[keys - length :, None]) & real[:, None, None, :]
