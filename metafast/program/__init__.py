"""A computation with static shapes, recorded once and replayed in memory of its own; README.md says how."""

from metafast.program.errors import NotRecordableError
from metafast.program.recording import is_recording, record
from metafast.program.replay import Program

__all__ = ["NotRecordableError", "Program", "is_recording", "record"]
