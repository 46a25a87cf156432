"""Schemas of ops in two forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def define_with_out(library: torch.library.Library, schema: str, tags: Sequence[torch.Tag] = ()) -> None:
    """Defines an op, and its overload ``out`` that writes into given tensors ``out0``, ``out1``, … instead.

    For a result that is a list, ``out`` takes a list. A captured step (:mod:`metafast.program`) replays the second. Its
    outputs have the memory order of the first's.
    """
    library.define(schema, tags=tags)
    name, _, rest = schema.partition("(")
    arguments, _, results = rest.rpartition(") ->")
    types = results.strip(" ()").split(", ")
    written = ", ".join(
        f"Tensor({letter}!){type.removeprefix('Tensor')} out{number}"
        for number, (letter, type) in enumerate(zip("abcdefgh", types, strict=False))
    )
    library.define(f"{name}.out({arguments}, *, {written}) -> ()")
