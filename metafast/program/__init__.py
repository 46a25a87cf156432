"""A computation with static shapes, recorded once and replayed in memory of its own; README.md says how."""

from metafast.program.replay import Program
from metafast.program.trace import NotRecordableError, record

__all__ = ["NotRecordableError", "Program", "record"]
