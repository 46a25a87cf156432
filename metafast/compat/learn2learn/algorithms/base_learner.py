"""The common part of the learners."""

from __future__ import annotations

from typing import Any

from torch import nn

from metafast.acceleration import Names, replaced_names
from metafast.compat.calls import called, follow


class BaseLearner(nn.Module):
    """A wrapped module that runs inside :func:`metafast.accelerate`; its attributes are the learner's too."""

    def __init__(self, module: nn.Module, names: Names | None = None) -> None:
        super().__init__()
        self.module = module
        self._names = replaced_names(module) if names is None else names
        follow(module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_modules"]["module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs."""
        with called(self.module, self._names):
            return self.module(*args, **kwargs)
