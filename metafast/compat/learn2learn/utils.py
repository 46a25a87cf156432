"""Modules whose parameters are tensors with a graph."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from metafast.compat.calls import follow

Module = TypeVar("Module", bound=nn.Module)
Memo = dict[Any, Tensor]


def clone_module(module: Module, memo: Memo | None = None) -> Module:
    """A copy of a module with clones of its parameters. Gradients flow from the clones to the originals.

    Submodules are copied; one that is in several places is copied once, and so is a parameter. Buffers that require a
    gradient are cloned; the others, running statistics say, are the original's.

    Args:
        module: the module to clone.
        memo: the clones made so far, by original.
    """
    if not isinstance(module, nn.Module):
        return module
    clone = _clone(module, {} if memo is None else memo, {})
    follow(clone)
    return clone


def _clone(module: Module, memo: Memo, modules: dict[nn.Module, Any]) -> Module:
    if module in modules:
        return cast(Module, modules[module])
    clone = modules[module] = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    for name in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[name] = module.__dict__[name].copy()
    # What takes a parameter's place has a graph: it is no Parameter.
    clone._parameters.update({key: _cloned(p, memo) for key, p in module._parameters.items() if p is not None})
    clone._buffers.update(
        {key: _cloned(b, memo) for key, b in module._buffers.items() if b is not None and b.requires_grad}
    )
    for key, child in module._modules.items():
        if child is not None:
            clone._modules[key] = _clone(child, memo, modules)
    return clone


def detach_module(module: nn.Module, keep_requires_grad: bool = False) -> None:
    """Cuts the parameters, and the buffers that require a gradient, of a cloned module off their graph, in place.

    Args:
        module: a clone.
        keep_requires_grad: tensors that required a gradient still require one, as leaves.
    """
    if not isinstance(module, nn.Module):
        return
    for param in module._parameters.values():
        if param is not None:
            _detach(param, keep_requires_grad)
    for buffer in module._buffers.values():
        if buffer is not None and buffer.requires_grad:
            _detach(buffer, keep_requires_grad)
    for child in module._modules.values():
        if child is not None:
            detach_module(child, keep_requires_grad)


def update_module(module: Module, updates: Sequence[Tensor | None] | None = None, memo: Memo | None = None) -> Module:
    """Puts p + u in the place of every parameter p of a module, differentiably.

    Args:
        module: is changed; its tensors are not.
        updates: one per parameter; None: the parameters' attributes ``update``, where they have one.
        memo: the new tensor of each old one; grows.

    Returns:
        ``module``.
    """
    memo = {} if memo is None else memo
    if updates is not None:
        params = list(module.parameters())
        check_lengths("update_module", "updates", len(params), len(updates))
        for param, update in zip(params, updates, strict=False):
            param.update = update  # type: ignore[attr-defined]
    places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for tensors in places:
        for key, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor not in memo:
                update = getattr(tensor, "update", None)
                if update is None:
                    continue
                tensor.update = None
                memo[tensor] = tensor + update
            tensors[key] = memo[tensor]
    for child in module._modules.values():
        if child is not None:
            update_module(child, memo=memo)
    return module


def check_lengths(function: str, what: str, params: int, found: int) -> None:
    """Warns where there are not as many gradients or updates as parameters; the rest is left as it is."""
    if params != found:
        warnings.warn(f"{function}(): expected {params} {what}, one per parameter, got {found}", stacklevel=3)


def _cloned(tensor: Tensor, memo: Memo) -> Any:
    if tensor not in memo:
        memo[tensor] = tensor.clone()
    return memo[tensor]


def _detach(tensor: Tensor, keep_requires_grad: bool) -> None:
    required = tensor.requires_grad
    tensor.detach_()
    # Of a leaf, detach_ leaves the flag as it is.
    tensor.requires_grad_(required and keep_requires_grad)
