"""Functional copies of modules: their parameters are a list of tensors that changes from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metafast.acceleration import Names, replaced_names
from metafast.compat.calls import called, follow


class Functional(nn.Module):
    """The attributes that a functional copy adds to those of its model."""

    # Where the parameters are: (module, name, index into the list).
    _places: list[tuple[nn.Module, str, int]]
    _history: list[list[Tensor]]
    _tracks: bool
    _names: Names

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """The model's outputs, with the latest fast parameters, or with ``params`` from now on."""
        if params is not None:
            self.update_params(params)
        with called(self, self._names):
            return super().forward(*args, **kwargs)  # the model's own: it is the next class

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """The fast parameters, in the order of the model's: the latest, or those of a step.

        Args:
            recurse: of no effect; parameters of submodules are among them.
            time: number of the step; 0 is the start.

        Raises:
            ValueError: an earlier step of a copy that keeps none.
        """
        time = -1 if time is None else time
        if not self._tracks and time not in (-1, 0):
            raise ValueError(f"time: expected None, 0 or -1, since higher gradients are not tracked, got {time}")
        return iter(self._history[time])

    @property
    def fast_params(self) -> list[Tensor]:
        """The latest parameters. Assigning to them is :meth:`update_params`."""
        return self._history[-1]

    @fast_params.setter
    def fast_params(self, params: Iterable[Tensor]) -> None:
        self.update_params(params)

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The parameters at the start."""
        if not self._tracks:
            raise ValueError("init_fast_params: expected track_higher_grads=True, which keeps them")
        return self._history[0]

    @property
    def track_higher_grads(self) -> bool:
        """Whether the parameters of earlier steps are kept."""
        return self._tracks

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Puts tensors in the place of the parameters, one for each of the model's."""
        params = list(params)
        if len(params) != len(self._history[0]):
            raise ValueError(f"params: expected {len(self._history[0])} tensors, one per parameter, got {len(params)}")
        if self._tracks:
            self._history.append(params)
        else:
            self._history = [params]
        self._place(params)

    def _place(self, params: list[Tensor]) -> None:
        for module, name, index in self._places:
            module._parameters[name] = params[index]  # type: ignore[assignment]  # no Parameter: it has a graph


def monkeypatch(
    module: nn.Module,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """A functional copy of ``module``, of a class of its own that inherits from the module's.

    Args:
        module: stays as it is; the copy has copies of its buffers.
        device, copy_initial_weights, track_higher_grads: as for ``innerloop_ctx``.
    """
    if isinstance(module, Functional):
        raise ValueError("model: expected a module that is not a functional copy already")
    originals = list(module.parameters())
    copy = _Copy({id(p): index for index, p in enumerate(originals)}, device)
    fmodel: Any = copy(module)
    kind = type(module)
    fmodel.__class__ = type(f"Functional{kind.__name__}", (Functional, kind), {"__module__": kind.__module__})
    params = [_detached(p) if copy_initial_weights else p.clone() for p in originals]
    params = [p if device is None else _moved(p, device) for p in params]
    fmodel.__dict__.update(
        _places=copy.places, _history=[params], _tracks=track_higher_grads, _names=replaced_names(module)
    )
    fmodel._place(params)
    follow(fmodel)
    return fmodel


class _Copy:
    """Copies a tree of modules: shared modules and tensors stay shared, parameters are left out."""

    def __init__(self, indices: dict[int, int], device: torch.device | None) -> None:
        self.places: list[tuple[nn.Module, str, int]] = []
        self._indices = indices
        self._device = device
        self._modules: dict[int, nn.Module] = {}
        self._buffers: dict[int, Tensor] = {}

    def __call__(self, module: nn.Module) -> nn.Module:
        if id(module) in self._modules:
            return self._modules[id(module)]
        clone = self._modules[id(module)] = module.__new__(type(module))
        clone.__dict__ = module.__dict__.copy()
        for name in ("_parameters", "_buffers", "_modules"):
            clone.__dict__[name] = module.__dict__[name].copy()
        self.places += [(clone, key, self._indices[id(p)]) for key, p in module._parameters.items() if p is not None]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                clone._buffers[key] = self._buffer(buffer)
        for key, child in module._modules.items():
            if child is not None:
                clone._modules[key] = self(child)
        return clone

    def _buffer(self, buffer: Tensor) -> Tensor:
        if id(buffer) not in self._buffers:
            copied = buffer.detach().clone()
            self._buffers[id(buffer)] = copied if self._device is None else copied.to(self._device)
        return self._buffers[id(buffer)]


def _detached(param: Tensor) -> Tensor:
    return param.detach().clone().requires_grad_(param.requires_grad)


def _moved(param: Tensor, device: torch.device) -> Tensor:
    moved = param.to(device)
    return moved if not param.is_leaf or moved is param else moved.detach().requires_grad_(param.requires_grad)
