"""``torch.utils.checkpoint`` inside a model whose parameters are a task's.

Torch recomputes the checkpointed part in the backward pass. By then the model has its own parameters back, and the
recomputation would silently use those. Here it gets the parameters, backend and attention of its forward.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from metafast.accelerate import Names, accelerated_thread
from metafast.backend import requested_backend, use_backend
from metafast.meta.surroundings import Buffers

# Every non-reentrant checkpoint passes here, whatever name the model calls `checkpoint` by, with the function that
# recomputes; the forward itself calls the model's.
_NAME = "_checkpoint_without_reentrant_generator"
_original = getattr(torch.utils.checkpoint, _NAME)
_lock = threading.Lock()
_users = 0


class _Stack(threading.local):
    def __init__(self) -> None:
        self.calls: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = []


_stack = _Stack()


@contextlib.contextmanager
def recomputed_with(module: nn.Module, params: dict[str, Tensor], names: Names) -> Iterator[None]:
    """What is checkpointed inside is recomputed with these parameters of ``module``.

    Raises:
        RuntimeError: when the model checkpoints under ``vmap``, whose tensors do not outlive the forward.
    """
    global _users
    backend = requested_backend()

    def recomputable(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with (
                accelerated_thread(names),
                use_backend(backend),
                # Buffers were updated in the forward.
                Buffers(module).scratch(),
                _reparametrize_module(module, params, tie_weights=True),
            ):
                return function(*args, **kwargs)

        return run

    with _lock:
        _users += 1
        if _users == 1:
            setattr(torch.utils.checkpoint, _NAME, _checkpoint)
    _stack.calls.append(recomputable)
    try:
        yield
    finally:
        _stack.calls.pop()
        with _lock:
            _users -= 1
            if _users == 0:
                setattr(torch.utils.checkpoint, _NAME, _original)


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not _stack.calls:
        return _original(function, *args, **kwargs)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("torch.utils.checkpoint inside the model does not run under vmap")
    return _original(_stack.calls[-1](function), *args, **kwargs)
