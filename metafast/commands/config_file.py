"""The file of ``train --config``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from metafast.commands.settings import check_kind, kinds

__all__ = ["read_config"]


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a TOML file: those of :class:`metafast.commands.settings.Settings`, and ``out``.

    Raises:
        ValueError: the file is no TOML, or it has a key that is no setting, or a value of another type; the message names
            the file and the key.
        OSError: the file cannot be read.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected TOML ({error})") from error
    known = {**kinds(), "out": str}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path}: {name}: expected a setting among {', '.join(known)}")
        try:
            check_kind(name, value, known[name])
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from error
    return values
