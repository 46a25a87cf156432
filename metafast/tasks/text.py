"""Texts as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Batch", "encode"]

Batch = dict[str, Tensor]
"""Texts as bytes and their labels: ``{"text": int64 [..., n, max_length], "label": int64 [..., n]}``."""


def encode(texts: Sequence[str], max_length: int) -> Tensor:
    """UTF-8 bytes of texts, cut after ``max_length`` (also within a character) and padded with zeros.

    Returns:
        uint8 ``[len(texts), max_length]``.

    Raises:
        ValueError: ``max_length`` is not positive, or a text is empty or holds the byte 0, which stands for padding.
    """
    if max_length < 1:
        raise ValueError(f"max_length: expected a positive number, got {max_length}")
    rows = []
    for text in texts:
        data = text.encode()[:max_length]
        if not data or 0 in data:
            raise ValueError(f"texts: expected text without NUL characters, not empty; got {text!r}")
        rows.append(data.ljust(max_length, b"\0"))
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).reshape(len(rows), max_length).clone()
