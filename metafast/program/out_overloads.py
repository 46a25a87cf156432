"""Calls that write into given tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_aten = torch.ops.aten


def writing(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Callable[[], object]:
    """A call without arguments that leaves ``op(*args, **kwargs)`` in ``outputs``.

    ``outputs`` have the structure of its results: a tensor, a list of tensors, or a tuple of these; None for a result that
    is not computed.
    """
    if op in _COPIES:
        return functools.partial(outputs.copy_, args[0])
    variant = out_variant(op)
    given = outputs if len(op._schema.returns) > 1 else (outputs,)
    tensors = _flat(outputs)
    # The overload wants an output for what it is told not to compute, too. Not every device has the overload.
    unfit = variant is None or op in _UNFIT or any(output is None for output in given)
    if variant is None or unfit or _is_masked(op, args, kwargs) or not _runs_on(variant[0], tensors[0].device):
        return functools.partial(_computed_and_copied, op, args, kwargs, given)
    overload, names = variant
    return functools.partial(overload, *args, **kwargs, **dict(zip(names, given, strict=True)))


@functools.cache
def out_variant(op: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    """The overload of ``op`` that writes its results into arguments, and their names; None if there is none."""
    packet = op.overloadpacket
    wanted = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    for name in packet.overloads():
        overload = getattr(packet, name)
        written = [argument for argument in overload._schema.arguments if argument.is_out]
        others = [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]
        # Factories lose the arguments that `out` decides.
        if len(written) == len(op._schema.returns) and others == wanted:
            return overload, tuple(argument.name for argument in written)
    return None


def _runs_on(op: OpOverload, device: torch.device) -> bool:
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), device.type.upper())


def _is_masked(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is told to leave some results out, for which a recording may have tensors all the same."""
    names = [argument.name for argument in op._schema.arguments]
    return not all(dict(zip(names, args, strict=False)).get("output_mask", kwargs.get("output_mask", ())))


def _computed_and_copied(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
    results = op(*args, **kwargs)
    for output, result in zip(outputs, results if len(op._schema.returns) > 1 else (results,), strict=True):
        # What was not computed is read by nobody.
        if result is not None and output is not None:
            for to, value in zip(_flat(output), _flat(result), strict=True):
                to.copy_(value)


def _flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results if result is not None for tensor in _flat(result)]


# What they do besides copying, memory format and dtype, the output has already.
_COPIES = {_aten.clone.default, _aten._to_copy.default}

# Their overloads do not fit. Losses make their result as large as what they reduce, for a time. QR takes results that share
# a storage for one and the same. Batch norm in training gets an input that is not contiguous wrong (torch 2.13 on the CPU).
_UNFIT = {
    _aten.binary_cross_entropy.default,
    _aten.mse_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.huber_loss.default,
    _aten.soft_margin_loss.default,
    _aten.linalg_qr.default,
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit.default,
    _aten._native_batch_norm_legit.no_stats,
}
