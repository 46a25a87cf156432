"""What cannot be recorded."""

from __future__ import annotations


class NotRecordableError(RuntimeError):
    """The function does something that a replay would not repeat."""
