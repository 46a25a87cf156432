"""Greedy and beam search over a model that hands its cache of keys and values on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metafast.arguments import check_positive

__all__ = ["search"]

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""From the ids ``[n, length]`` that follow what a cache has seen, and the cache, to the logits ``[n, vocabulary]`` of the
next id, and the new cache: a pytree of tensors whose first dimension is the sequence."""


@torch.no_grad()
def search(
    step: Step,
    start: Tensor,
    cache: Any,
    *,
    end: int,
    padding: int,
    max_new_tokens: int,
    beams: int,
    length_penalty: float,
) -> Tensor:
    """The most likely continuation that beam search finds, which is greedy search with one beam.

    A hypothesis that has ended stays among the beams. Hypotheses compare by the sum of their logarithmic probabilities over
    (number of new ids) ^ ``length_penalty`` (Wu et al. 2016, arXiv:1609.08144, section 7, without its constant).

    Args:
        step: one step of the model.
        start: int64 ``[n, length]``, ids that every continuation of a sequence begins with.
        cache: what the model has seen before ``start``.
        end, padding: ids that end a sequence and that follow its end.
        max_new_tokens: most ids that are added.
        beams: hypotheses per sequence.
        length_penalty: 0 compares sums; larger ones prefer longer hypotheses.

    Returns:
        int64 ``[n, length + new]``: ``start`` and the best continuation, with ``end`` where it has ended, then ``padding``.

    Raises:
        ValueError: ``beams`` or ``max_new_tokens`` is not positive.
    """
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("beams", beams)
    sequences = start.shape[0]
    logits, cache = step(start, cache)
    # At first all beams of a sequence are alike: only one of them may go on.
    totals = torch.full((sequences, beams), -torch.inf, device=start.device)
    totals[:, 0] = 0
    logits, cache, ids = (_repeated(tree, beams) for tree in (logits, cache, start))
    ended = torch.zeros(sequences * beams, dtype=torch.bool, device=start.device)
    lengths = torch.zeros_like(totals)
    for number in range(max_new_tokens):
        if number:
            logits, cache = step(ids[:, -1:], cache)
        scores = logits.float().log_softmax(-1)
        vocabulary = scores.shape[-1]
        scores[ended] = -torch.inf
        scores[ended, padding] = 0
        new = totals.view(-1, 1) + scores
        counts = lengths.view(-1, 1) + (~ended).float().unsqueeze(1)
        ranked = (new / counts.clamp(min=1) ** length_penalty).view(sequences, beams * vocabulary)
        best = ranked.topk(beams, dim=1).indices
        parents = best // vocabulary + beams * torch.arange(sequences, device=start.device).unsqueeze(1)
        parents, tokens = parents.view(-1), (best % vocabulary).view(-1)
        totals = new[parents, tokens].view(sequences, beams)
        lengths = counts[parents].view(sequences, beams)
        ids = torch.cat((ids[parents], tokens.unsqueeze(1)), 1)
        cache = pytree.tree_map(lambda leaf, rows=parents: leaf.index_select(0, rows), cache)
        ended = ended[parents] | (tokens == end)
        if ended.all():
            break
    # Beams are sorted.
    return ids.view(sequences, beams, -1)[:, 0]


def _repeated(tree: Any, beams: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf.repeat_interleave(beams, 0), tree)
