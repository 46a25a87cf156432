"""Other tensors in the places of a module's parameters and buffers, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# What recurrent layers keep of their parameters besides.
_COPIES = ("_flat_weights", "_flat_weight_refs")


@contextlib.contextmanager
def placed(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """These tensors stand in for parameters and buffers of ``module`` wherever it has them: tied ones by one of their names.

    ``torch.func.functional_call`` does the same for most modules. Of a module that is registered under two names it leaves
    the given tensors behind, and recurrent layers keep them in their lists.

    Args:
        module: the module.
        tensors: by name. Afterwards it holds what stands in these places then: a buffer may have been bound anew.

    Raises:
        KeyError: there is no parameter or buffer of a name.
    """
    places: dict[str, tuple[dict[str, Any], str]] = {}
    same: dict[int, dict[tuple[int, str], tuple[dict[str, Any], str]]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for members in (part._parameters, part._buffers):
            for key, tensor in members.items():
                place = places[f"{path}.{key}" if path else key] = (members, key)
                if tensor is not None:
                    same.setdefault(id(tensor), {})[id(members), key] = place
    swaps = []
    for name, tensor in tensors.items():
        members, key = places[name]
        original = members[key]
        everywhere = [(members, key)] if original is None else list(same[id(original)].values())
        swaps.append((name, original, tensor, everywhere))
    copies = [
        (part, {key: vars(part)[key] for key in _COPIES if key in vars(part)})
        for part in module.modules()
        if isinstance(part, nn.RNNBase)
    ]
    try:
        for _, _, tensor, everywhere in swaps:
            for members, key in everywhere:
                members[key] = tensor
        yield
    finally:
        for name, original, _, everywhere in swaps:
            members, key = places[name]
            tensors[name] = members[key]
            for members, key in everywhere:
                members[key] = original
        for part, kept in copies:
            vars(part).update(kept)
