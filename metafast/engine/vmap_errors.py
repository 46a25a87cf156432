"""Errors under vmap: those of vmap itself, and those of the user's own code."""

from __future__ import annotations

import dis
from pathlib import Path

import torch

_RAISE = dis.opmap["RAISE_VARARGS"]
_INSTALLED = ("site-packages", "dist-packages")
_MEMORY = ("can't allocate memory", "out of memory")


def is_users_own(error: BaseException) -> bool:
    """Whether an error has nothing to do with vmap.

    That is so where memory ran out, and where a ``raise`` in the user's code made it without another error as its cause. The
    loop over tasks would hide such an error where it does not occur again.
    """
    if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MEMORY):
        return True
    if error.__cause__ is not None or error.__context__ is not None:
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code = traceback.tb_frame.f_code
    # Of what is installed, one cannot know; this package lies elsewhere while it is developed.
    installed = any(part in _INSTALLED for part in Path(code.co_filename).parts)
    ours = traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "metafast")
    return not installed and not ours and code.co_code[traceback.tb_lasti] == _RAISE
