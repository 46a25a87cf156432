"""Which of a model's parameters the inner loop adapts."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from torch import nn

from metafast.meta.tasks import Params

# Patterns as of the shell ("head.*"), or ``predicate(name, parameter)``.
Selection: TypeAlias = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


class Split(NamedTuple):
    """Names of the parameters that require a gradient: what the inner loop adapts, and what it shares."""

    adapted: list[str]
    shared: list[str]


def split_parameters(model: nn.Module, selection: Selection | None) -> Split:
    """Splits by ``selection``; None adapts all that require a gradient. A tied parameter counts once, by any of its names.

    Raises:
        TypeError: ``selection`` is neither patterns nor a callable.
        ValueError: nothing is left to adapt, or a pattern matches no parameter at all.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if selection is None:
        chosen = {id(p) for p in trained.values()}
    else:
        named = list(model.named_parameters(remove_duplicate=False))
        matches = _predicate(selection, [name for name, _ in named])
        chosen = {id(p) for name, p in named if matches(name, p)}
    adapted = [name for name, p in trained.items() if id(p) in chosen]
    if not trained:
        raise ValueError("model: expected parameters that require a gradient, got none to adapt")
    if not adapted:
        raise ValueError(
            f"adapt_parameters: expected to match a parameter that requires a gradient of {_some(trained)}; got none"
        )
    return Split(adapted, [name for name in trained if name not in set(adapted)])


def picked(model: nn.Module, names: Sequence[str]) -> Params:
    """The parameters of these names."""
    params = dict(model.named_parameters())
    return {name: params[name] for name in names}


def _predicate(selection: Selection, names: Sequence[str]) -> Callable[[str, nn.Parameter], bool]:
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str) else list(selection)
    if not all(isinstance(pattern, str) for pattern in patterns):
        kinds = ", ".join(sorted({type(pattern).__name__ for pattern in patterns}))
        raise TypeError(f"adapt_parameters: expected patterns or a callable(name, parameter), got a list of {kinds}")
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"adapt_parameters: expected to match a parameter of {_some(names)}; got {pattern!r}")
    return lambda name, _: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, 6))
    return ", ".join(first[:5]) + (", …" if len(first) > 5 else "")
