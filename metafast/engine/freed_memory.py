"""Memory that Python and torch have freed, given back to the operating system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Gives back what glibc keeps of freed memory, and nothing elsewhere.

    The graph of a step consists of many tensors below glibc's threshold for memory of their own, which grows with what was
    freed. After a call that runs once, such as the uncaptured one beside a replay, their memory would stay with the process
    for good: more than the whole program takes. Walking through the heap takes milliseconds.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        # Not glibc; on Windows there is no library without a name.
        return None
