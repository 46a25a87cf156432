"""``torch.utils.checkpoint`` inside a model whose parameters are a task's.

Torch recomputes the checkpointed part in the backward pass. By then the model has its own parameters back, or those of a
later inner step, and the recomputation would silently use those. Here it gets the parameters, buffers, training mode,
backend and attention of its forward.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from metafast.acceleration import Names, accelerated_thread
from metafast.backend import requested_backend, use_backend
from metafast.engine.placed_tensors import placed
from metafast.engine.replay_state import Buffers

# Every checkpoint passes here, whatever name the model calls `checkpoint` by, with the function that recomputes.
_NAME = "_checkpoint_without_reentrant_generator"
_original = getattr(torch.utils.checkpoint, _NAME)
_Reentrant = torch.utils.checkpoint.CheckpointFunction
_original_reentrant = _Reentrant.forward


class _Call(NamedTuple):
    """A module as it is called: with these parameters (None: with those that it has), and these names accelerated."""

    module: nn.Module
    params: dict[str, Tensor] | None
    names: Names | None


class _Here(threading.local):
    """The calls that this thread runs, innermost last, and the modules whose parameters change between calls."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        # By identity.
        self.followed: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


_here = _Here()


@contextlib.contextmanager
def recomputed_with(module: nn.Module, params: dict[str, Tensor] | None, names: Names) -> Iterator[None]:
    """Parts that the ``with`` block checkpoints are recomputed with these parameters of ``module``, accelerated.

    Args:
        module: the module that runs inside.
        params: by name; None: those that ``module`` has when the checkpoint is reached.
        names: of :func:`metafast.accelerate.replaced_names`.

    Raises:
        RuntimeError: when the model checkpoints under ``vmap`` with ``params``, whose tensors do not outlive the forward.
    """
    _replace()
    _here.calls.append(_Call(module, params, names))
    try:
        yield
    finally:
        _here.calls.pop()


def follow(module: nn.Module) -> None:
    """Parts that this thread checkpoints from now on are recomputed with the parameters that ``module`` has at that moment.

    For modules whose parameters change from step to step, and which are called in ways that cannot be foreseen: as a
    whole, by their parts, by other methods, or by a function that is checkpointed as a whole.
    """
    _replace()
    _here.followed[id(module)] = module


class _Moment:
    """The backend and the modules' parameters that a checkpointed function computes with, besides its arguments."""

    def __init__(self) -> None:
        self._backend = requested_backend()
        found = {key: _Call(module, None, None) for key, module in _here.followed.items()}
        found |= {id(call.module): call for call in _here.calls}
        self._calls = [
            call if call.params is not None else call._replace(params=dict(call.module.named_parameters()))
            for call in found.values()
        ]
        self._buffers = [Buffers(call.module) for call in self._calls]
        self._training = [(part, part.training) for call in self._calls for part in call.module.modules()]

    def computed(self) -> None:
        """To be called after the forward: forgets the buffers that it left alone."""
        for buffers in self._buffers:
            buffers.keep_changed()

    def recomputing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as it was at this moment; it changes nothing, for the forward did."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._back():
                return function(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def _back(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(use_backend(self._backend))
            now = [(part, part.training) for part, _ in self._training]
            stack.callback(_set_training, now)
            for call, buffers in zip(self._calls, self._buffers, strict=True):
                assert call.params is not None
                stack.enter_context(Buffers(call.module).scratch())
                stack.enter_context(buffers.scratch())
                stack.enter_context(placed(call.module, call.params))
                if call.names is not None:
                    stack.enter_context(accelerated_thread(call.names))
                # A checkpoint inside of the checkpoint; autograd may run this in a thread of its own.
                _here.calls.append(call)
                stack.callback(_here.calls.pop)
            _set_training(self._training)
            yield


def _set_training(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training


def _replace() -> None:
    """Puts this module's functions in the place of torch's; they call torch's own where nothing is followed."""
    if getattr(torch.utils.checkpoint, _NAME) is _original:
        setattr(torch.utils.checkpoint, _NAME, _checkpoint)
        setattr(_Reentrant, "forward", staticmethod(_checkpoint_reentrant))  # noqa: B010  # no assignment to a method


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    under_transform = torch._C._are_functorch_transforms_active()
    if under_transform and _here.calls and _here.calls[-1].params is not None:
        raise RuntimeError("torch.utils.checkpoint inside the model does not run under vmap")
    if under_transform or not (_here.calls or _here.followed):
        yield from _original(function, *args, **kwargs)
        return
    moment = _Moment()
    yield from _original(moment.recomputing(function), *args, **kwargs)
    moment.computed()


def _checkpoint_reentrant(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
    if not (_here.calls or _here.followed):
        return _original_reentrant(ctx, function, *args)
    moment = _Moment()
    # The forward calls it once; every further call recomputes.
    calls = iter([function])
    again = moment.recomputing(function)
    result = _original_reentrant(ctx, lambda *inputs: next(calls, again)(*inputs), *args)
    moment.computed()
    return result
