"""Which implementation an op runs, and how metafast was built.

``"fused"`` is the compiled path (C++ on the CPU, Triton and CUDA on a GPU), ``"reference"`` plain PyTorch, ``"auto"``
the fused path where it can run and the reference elsewhere. Precedence: the op's ``backend`` argument, then
:class:`use_backend`, then the environment variable ``METAFAST_BACKEND``, then ``"auto"``.

The choice is for attention and the task update. The layer ops that ``accelerate`` swaps in run kernels where these exist,
and torch's own op elsewhere and for ``"reference"`` (``ops/layers/README.md``).

An op resolves the choice once, in its forward. Nothing is looked up in the backward pass: by then the context manager
may be gone, and autograd's threads never saw it. Under ``torch.compile`` the choice is made when the code is traced.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import logging
import os
import platform
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, Literal, TypeVar

import torch

from metafast.version import __version__

__all__ = ["BackendUnavailableError", "build_info", "use_backend"]

BACKENDS = ("auto", "fused", "reference")
Resolved = Literal["fused", "reference"]
F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger("metafast")
_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("metafast_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot serve the call; the message lists every reason."""


class use_backend:  # noqa: N801 - reads as a verb where it is used, like torch.no_grad
    """Context manager that chooses the backend of every metafast op called inside it, in this thread.

    ``"fused"`` raises where attention or the task update cannot run fused; layer ops never raise for it.

    Args:
        backend: ``"auto"``, ``"fused"`` or ``"reference"``.

    Raises:
        ValueError: ``backend`` is none of these.
    """

    def __init__(self, backend: str) -> None:
        self.backend = _checked(backend, "backend")
        self._tokens: list[contextvars.Token[str | None]] = []

    def __enter__(self) -> use_backend:
        self._tokens.append(_context.set(self.backend))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _context.reset(self._tokens.pop())


def constant_when_compiled(function: F) -> F:
    """``torch.compiler.assume_constant_result``, without its import of torch._dynamo, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def requested_backend(argument: str | None = None) -> str:
    """The choice of the caller, by the precedence above; whether it can run is decided later."""
    if argument is not None:
        return _checked(argument, "backend")
    chosen = _context.get()
    if chosen is not None:
        return chosen
    return _checked(os.environ.get("METAFAST_BACKEND") or "auto", "METAFAST_BACKEND")


def resolve_backend(op: str, argument: str | None, reasons: list[str]) -> Resolved:
    """The backend that ``op`` runs.

    Args:
        op: name of the op, for messages.
        argument: the op's ``backend`` argument.
        reasons: why the fused path cannot serve this call; empty where it can serve it.

    Raises:
        BackendUnavailableError: ``"fused"`` was asked for and there are reasons against it.
    """
    requested = requested_backend(argument)
    if requested == "reference":
        return "reference"
    if not reasons:
        return "fused"
    if requested == "fused":
        raise BackendUnavailableError(f"{op}: the fused backend cannot serve this call: " + "; ".join(reasons))
    if not torch.compiler.is_compiling():
        _log_once(op, tuple(reasons))
    return "reference"


@functools.cache
def extension() -> ModuleType | None:
    """The compiled extension, loaded at the first call; None where it cannot be (see :func:`extension_problem`)."""
    return _load("metafast._C")[0]


@constant_when_compiled
def extension_problem() -> str | None:
    """Why the compiled extension cannot be used; None where it can."""
    return _load("metafast._C")[1]


@constant_when_compiled
def triton_problem() -> str | None:
    """Why Triton cannot be used; None where it can."""
    return _load("triton")[1]


def build_info() -> dict[str, Any]:
    """Versions, how the extension was compiled, which backends are usable here, and why others are not.

    Loads the extension and Triton to see whether they load.
    """
    compiled, triton = extension(), _load("triton")[0]
    cuda = "no CUDA device is visible to torch" if not torch.cuda.is_available() else triton_problem()
    return {
        "metafast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": getattr(triton, "__version__", None),
        "cuda": torch.version.cuda,
        "extension": compiled.build_info() if compiled is not None else None,
        "requested backend": requested_backend(),
        "backends": {
            "fused (cpu)": _usable(extension_problem()),
            "fused (cuda)": _usable(cuda),
            "reference": "usable",
        },
    }


def _usable(problem: str | None) -> str:
    return "usable" if problem is None else f"unusable: {problem}"


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(name), None
    except (ImportError, OSError) as error:
        return None, f"{name} does not load ({error})"


@functools.cache
def _log_once(op: str, reasons: tuple[str, ...]) -> None:
    logger.info("%s runs on the reference path: %s", op, "; ".join(reasons))


def _checked(backend: str, argument: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend
