"""Checks of arguments that several packages share."""

from __future__ import annotations

__all__ = ["check_positive"]


def check_positive(name: str, number: int) -> int:
    """Returns ``number``. Raises TypeError or ValueError where it is no positive int."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
    if number < 1:
        raise ValueError(f"{name}: expected a positive number, got {number}")
    return number
