"""What the ops' autograd Functions share."""

from __future__ import annotations

import inspect
from typing import TypeVar

from torch.autograd import Function

F = TypeVar("F", bound=type[Function])


def with_signature(function: F) -> F:
    """Class decorator: keeps ``forward``'s signature, which ``Function.apply`` asks for in every call.

    Working it out anew takes longer than a small kernel.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function
