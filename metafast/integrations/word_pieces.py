"""A tokenizer of one's own: byte-level pieces of words (Sennrich et al. 2016, arXiv:1508.07909), learned from texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["SPECIAL", "learn_word_pieces"]

SPECIAL = ("[PAD]", "[UNK]", "[START]", "[END]")
"""Ids 0 to 3, those that :mod:`metafast.models` and the tasks of pairs take by default."""


def learn_word_pieces(texts: Iterable[str], size: int) -> Any:
    """Learns pieces of words from texts. Every text has pieces, since all bytes are among them.

    Args:
        texts: those to learn from: of training tasks alone.
        size: number of ids, of which 4 are special and 256 are bytes.

    Returns:
        a ``transformers.PreTrainedTokenizerFast`` that ends every text with ``[END]``, but for ``add_special_tokens=False``.

    Raises:
        ImportError: transformers is missing.
        ValueError: ``size`` is too small.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(SPECIAL):
        raise ValueError(f"size: expected at least {len(alphabet) + len(SPECIAL)}, got {size}")
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.NFC()
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    pieces.post_processor = processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", SPECIAL.index("[END]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", bos_token="[START]", eos_token="[END]"
    )
