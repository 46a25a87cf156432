"""Checkpoints: one safetensors file, written whole or not at all.

Tensors are entries of the file. All else, such as numbers of an optimizer's groups, is JSON in its metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_state", "read_checkpoint", "read_metadata", "write", "write_checkpoint"]

_STATE = "metafast.state"
# Keys that stand for what JSON has not.
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


def write(path: Path, data: bytes) -> None:
    """Replaces a file at once: a reader finds the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            # A machine that stops has the old file or the new one, too.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written and is as it was: {error.strerror}") from error


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Raises:
        TypeError: the state holds something else.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    described = _described(state, "state", tensors)
    write(path, save(tensors, {_STATE: json.dumps(described)}))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that a checkpoint holds, with its tensors on the CPU.

    Raises:
        ValueError: the file cannot be read or is no checkpoint.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = json.loads((file.metadata() or {})[_STATE])
        state = _restored(described, tensors)
    except Exception as error:
        raise _unreadable(path, error) from error
    assert isinstance(state, dict)
    return state


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The entries of a checkpoint's state that hold no tensors.

    Raises:
        ValueError: the file cannot be read or is no checkpoint.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            described = json.loads((file.metadata() or {})[_STATE])
    except Exception as error:
        raise _unreadable(path, error) from error
    return {name: _restored(value, {}) for name, value in described.items() if _TENSOR not in json.dumps(value)}


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    # safetensors has errors of its own for what is broken off, and torch others.
    reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(f"checkpoint: expected a checkpoint of metafast.training in {path} ({reason})")


def check_state(module: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError where the tensors of a checkpoint are not those of the module; the message says what differs."""
    expected = module.state_dict()
    differences = [
        *(f"{name} is missing" for name in expected if name not in state),
        *(f"{name} is not a parameter of the model" for name in state if name not in expected),
        *(
            f"{name} has shape {list(state[name].shape)}, the model's {list(value.shape)}"
            for name, value in expected.items()
            if isinstance(value, Tensor) and name in state and state[name].shape != value.shape
        ),
    ]
    if differences:
        more = "" if len(differences) <= 5 else f"; and {len(differences) - 5} more"
        raise ValueError(
            f"checkpoint: expected the parameters of this architecture, got another in {path}: "
            + "; ".join(differences[:5])
            + more
        )


def _described(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, with names of tensors in the place of tensors, which go to ``tensors``."""
    if isinstance(value, Tensor):
        # Safetensors refuses tensors that share memory, as tied parameters do.
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _described(entry, f"{path}.{key}", tensors) for key, entry in value.items()}
        return {_ITEMS: [[key, _described(entry, f"{path}.{key}", tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        entries = [_described(entry, f"{path}.{index}", tensors) for index, entry in enumerate(value)]
        return {_TUPLE: entries} if isinstance(value, tuple) else entries
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: expected tensors, numbers, strings and containers of these, got {type(value).__name__}")


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_restored(entry, tensors) for entry in value[_TUPLE])
    if _ITEMS in value:
        return {key: _restored(entry, tensors) for key, entry in value[_ITEMS]}
    return {key: _restored(entry, tensors) for key, entry in value.items()}


def random_states() -> dict[str, Any]:
    """The states of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Sets torch's global generators to :func:`random_states`."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
