"""A small Transformer that turns one text into another."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast.models.classifier import PADDING, Encoder
from metafast.models.decoder import Cache, DecoderLayer, start_embeddings, through
from metafast.models.generation import search

__all__ = ["EncoderDecoder"]


class _Copying(NamedTuple):
    """What of a source all ids of the target are copied by.

    Attributes:
        ids: ``[n, source]``.
        keys: of the attention to them, ``[n, source, width]``.
        before: the id before each, ``[n, source]``.
        places: how many tokens are before each, ``[n, source]``.
        same: which have the same id, bool ``[n, source, source]``.
        is_first: which is the first token of its id, bool ``[n, source]``.
    """

    ids: Tensor
    keys: Tensor
    before: Tensor
    places: Tensor
    same: Tensor
    is_first: Tensor


class _Source(NamedTuple):
    """An encoded source: where it has tokens, bool ``[n, source]``, states ``[n, source, width]``, and what is copied by.

    Tensors alone, since search reorders them; nothing to copy by is an empty tuple.
    """

    real: Tensor
    states: Tensor
    copying: _Copying | tuple[()]


class EncoderDecoder(nn.Module):
    """An :class:`metafast.models.Encoder`, and a decoder that attends to its states.

    With ``copies`` the next id is, with a probability that the model computes, one of the source's ids, drawn by an
    attention to them (See et al. 2017, arXiv:1704.04368, equations 4, 8 and 9): names and related languages are largely
    copied. What is attended to also tells which id to write instead. The attention prefers, by a learned amount, what
    follows in the source the id that was written last, as CopyNet does (Gu et al. 2016, arXiv:1603.06393, section 3.3), and
    by another one what is at about the same place of the source, near the diagonal (Dyer et al. 2013,
    https://aclanthology.org/N13-1073, section 2).

    Args:
        vocabulary: number of ids, of source and target; id 0 is padding.
        width, layers, heads: size of a position's vector, layers of the encoder and of the decoder, heads per layer.
        max_length: longest source and longest target.
        copies: whether ids of the source can be copied.
        start, end: ids that targets are started with and end with, for :meth:`generate` and for the decoder's input.

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
        max_length: int = 64,
        copies: bool = True,
        start: int = 2,
        end: int = 3,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(vocabulary=vocabulary, width=width, layers=layers, heads=heads, max_length=max_length)
        self.start, self.end = start, end
        self.max_length = max_length
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(max_length + 1, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, 2 * width, attends_encoder=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        start_embeddings(self.tokens, self.positions)
        start_embeddings(self.encoder.tokens, self.encoder.positions)
        self.copies = copies
        if copies:
            self.copy_query = nn.Linear(width, width)
            self.copy_key = nn.Linear(width, width)
            self.copy_value = nn.Linear(width, width)
            self.copy_gate = nn.Linear(width, 1)
            # Its exponential is how much likelier the following id is than another one.
            self.copy_following = nn.Parameter(torch.tensor(4.0))
            # Its exponential is how much less likely an id is for every place that it is further off.
            self.copy_distance = nn.Parameter(torch.tensor(0.2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
        """Logits of every label from the source and the labels before it.

        Args:
            input_ids: source, int64 ``[n, source]``, at most ``max_length`` long.
            attention_mask: ``[n, source]``, not 0 where there is a token; None: where the id is not 0.
            labels: int64 ``[n, target]``, −100 after the end of a text.

        Returns:
            ``[n, target, vocabulary]``.

        Raises:
            ValueError: source or target has another rank or is too long.
        """
        if labels.dim() != 2 or labels.shape[1] > self.max_length:
            raise ValueError(f"labels: expected [n, length] with length <= {self.max_length}, got {list(labels.shape)}")
        source = self._encode(input_ids, attention_mask)
        # What follows the end of a text is not a label, and what is there does not matter.
        inputs = F.pad(labels.clamp(min=0)[:, :-1], (1, 0), value=self.start)
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        states, _ = self._decode(inputs, positions, None, None, source)
        return self._logits(states, inputs, positions, source)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Tensor:
        """Translates, greedily or by beam search, with a cache of keys and values.

        Args:
            input_ids, attention_mask: source, as for a call.
            max_new_tokens: most ids of a target; None: ``max_length``.
            num_beams, length_penalty: hypotheses per text, and how they compare (:func:`metafast.models.generation.search`).

        Returns:
            int64 ``[n, 1 + new]``: ``start``, then the target, padded with zeros after ``end``.

        Raises:
            ValueError: the source has another rank or is too long, or ``max_new_tokens`` is not 1 to ``max_length``.
        """
        most = self.max_length if max_new_tokens is None else max_new_tokens
        if most > self.max_length:
            raise ValueError(f"max_new_tokens: expected at most {self.max_length}, got {most}")

        def step(ids: Tensor, cache: tuple[_Source, list[Cache] | None]) -> tuple[Tensor, object]:
            source, caches = cache
            seen = 0 if caches is None else caches[0][0].shape[2]
            # One id follows what was seen, all of which it may attend to.
            mask = torch.ones(1, 1, 1, seen + 1, dtype=torch.bool, device=ids.device)
            positions = torch.tensor([seen], device=ids.device)
            states, caches = self._decode(ids, positions, mask, caches, source)
            logits = self._logits(states[:, -1:], ids[:, -1:], positions, source)[:, 0]
            return logits, (source, caches)

        return search(
            step,
            input_ids.new_full((len(input_ids), 1), self.start),
            (self._encode(input_ids, attention_mask), None),
            end=self.end,
            padding=PADDING,
            max_new_tokens=most,
            beams=num_beams,
            length_penalty=length_penalty,
        )

    def _encode(self, input_ids: Tensor, attention_mask: Tensor | None) -> _Source:
        real = input_ids != PADDING if attention_mask is None else attention_mask != 0
        states = self.encoder(input_ids, real)
        if not self.copies:
            return _Source(real, states, ())
        same = input_ids[:, :, None] == input_ids[:, None, :]
        copying = _Copying(
            ids=input_ids,
            keys=self.copy_key(states),
            before=F.pad(input_ids[:, :-1], (1, 0), value=self.start),
            # A padded source begins with its first id, wherever that is.
            places=real.long().cumsum(1) - 1,
            same=same,
            is_first=real & ~(same & real[:, None, :] & torch.ones_like(same).tril(-1)).any(-1),
        )
        return _Source(real, states, copying)

    def _decode(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, caches: list[Cache] | None, source: _Source
    ) -> tuple[Tensor, list[Cache]]:
        x = self.tokens(ids) + self.positions(positions)
        x, new = through(self.layers, x, mask, caches, source.states, source.real[:, None, None, :])
        return self.norm(x), new

    def _logits(self, states: Tensor, inputs: Tensor, positions: Tensor, source: _Source) -> Tensor:
        """``[n, target, vocabulary]`` from the decoder's states and ids, and their places in the target."""
        copying = source.copying
        if not isinstance(copying, _Copying):
            return self.head(states)
        keys = copying.keys
        follows = (inputs[:, :, None] == copying.before[:, None, :]).to(keys.dtype)
        distances = (positions[:, None] - copying.places[:, None, :]).abs().to(keys.dtype)
        scores = self.copy_query(states) @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
        scores = scores + self.copy_following * follows - self.copy_distance * distances
        weights = scores.masked_fill(~source.real[:, None, :], -1e4).softmax(-1)
        states = states + self.copy_value(weights @ source.states)
        logits = self.head(states)
        # Every id's share of the attention, at the places of the source, and what it adds to the id's logit. The sum of
        # both ways' probabilities is taken there alone: elsewhere nothing is copied.
        shares = (weights @ copying.same.to(weights.dtype)).clamp(min=1e-9).log()
        at = copying.ids[:, None, :].expand_as(weights)
        written = logits.gather(2, at)
        copied = self.copy_gate(states) + logits.logsumexp(-1, keepdim=True) + shares
        added = (torch.logaddexp(written, copied) - written) * copying.is_first[:, None, :]
        return logits.scatter_add(2, at, added)
