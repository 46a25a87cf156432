"""A computation with static shapes, recorded once and replayed in memory of its own; README.md says how."""

from metafast.program.replay import Program
from metafast.program.trace import NotRecordableError, is_recording, record

__all__ = ["NotRecordableError", "Program", "is_recording", "record"]
