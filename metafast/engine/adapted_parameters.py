"""The parameters of a model that the inner loop adapts."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from torch import nn

from metafast.engine.task_batch import Params

# Patterns as of the shell ("head.*"), or ``predicate(name, parameter)``.
Selection: TypeAlias = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


class ParameterSplit(NamedTuple):
    """Parameters by name: those that the inner loop adapts, and those that tasks share, which get a meta-gradient too."""

    adapted: Params
    shared: Params


class AdaptedParameters:
    """The adapted parameters of a model. ``selection`` chooses them once; from then on they are known by name.

    Args:
        model: the module.
        selection: None adapts all that require a gradient. A tied parameter counts once, by any of its names.

    Raises:
        TypeError: ``selection`` is neither patterns nor a callable.
        ValueError: nothing is left to adapt, or a pattern matches no parameter at all.
    """

    def __init__(self, model: nn.Module, selection: Selection | None) -> None:
        trained = _trained(dict(model.named_parameters()))
        if not trained:
            raise ValueError("model: expected parameters that require a gradient, got none to adapt")
        if selection is None:
            chosen = {id(p) for p in trained.values()}
        else:
            named = list(model.named_parameters(remove_duplicate=False))
            matches = _predicate(selection, [name for name, _ in named])
            chosen = {id(p) for name, p in named if matches(name, p)}
        self._names = [name for name, p in trained.items() if id(p) in chosen]
        if not self._names:
            raise ValueError(
                f"adapt_parameters: expected to match a parameter that requires a gradient of {_some(trained)}; got none"
            )
        self._known = frozenset(name for name, _ in model.named_parameters())

    def split(self, model: nn.Module) -> ParameterSplit:
        """The parameters as they are now, without those that were frozen since.

        Where all adapted parameters were frozen, as in a copy for evaluation, they are adapted nevertheless.

        Raises:
            ValueError: the model has gained or lost parameters since.
        """
        params: Params = dict(model.named_parameters())
        if changed := sorted(self._known ^ params.keys()):
            raise ValueError(
                "model: expected the parameters that the learner was made with, of which it chose those to adapt; "
                f"{', '.join(changed)} came or went since. Make a new learner"
            )
        chosen = {name: params.pop(name) for name in self._names}
        return ParameterSplit(_trained(chosen) or chosen, _trained(params))


def _trained(params: Params) -> Params:
    return {name: p for name, p in params.items() if p.requires_grad}


def _predicate(selection: Selection, names: Sequence[str]) -> Callable[[str, nn.Parameter], bool]:
    if callable(selection):
        return selection
    if not isinstance(selection, Iterable):
        raise TypeError(
            f"adapt_parameters: expected patterns or a callable(name, parameter), got {type(selection).__name__}"
        )
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
