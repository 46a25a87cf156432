"""The matrix products of linear layers, each by what computes it fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast.backend import requested_backend
from metafast.ops.layers import library as _library  # noqa: F401 - defines the op
from metafast.ops.layers.kernels import runs_kernels
from metafast.ops.torch_internals import (
    are_transforms_active,
    is_legacy_batched,
    multiplies_bfloat16,
    multiplies_float16,
)

_SUPPORTED = {torch.bfloat16: multiplies_bfloat16, torch.float16: multiplies_float16}


def are_slow(*tensors: Tensor) -> bool:
    """Whether torch's products of this one type run without instructions for it: at a tenth of float32's rate or less."""
    dtype = tensors[0].dtype
    return (
        dtype in _SUPPORTED
        and all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors)
        and requested_backend() != "reference"
        and not torch.compiler.is_compiling()
        and not _SUPPORTED[dtype]()
    )


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, batched, by torch: what is best where ``left`` is transposed."""
    if are_slow(left, right):
        with torch.autocast("cpu", enabled=False):
            return torch.bmm(left.float(), right.float()).to(left.dtype)
    return torch.bmm(left, right)


def total(start: Tensor | None, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """``start`` and the product of each pair, of those that there are."""
    present = [(left, right) for left, right in pairs if left is not None and right is not None]
    if not present:
        return start
    lefts, rights = zip(*present, strict=True)
    tensors = [*lefts, *rights] if start is None else [start, *lefts, *rights]
    if are_slow(*tensors):
        with torch.autocast("cpu", enabled=False):
            result = total(None if start is None else start.float(), *((a.float(), b.float()) for a, b in present))
        assert result is not None
        return result.to(present[0][0].dtype)
    # The kernel has neither derivatives nor a batching rule (is_grads_batched brings a vmap of its own).
    beneath = not torch.is_grad_enabled() and not are_transforms_active()
    if beneath and runs_kernels("linear", *tensors) and not any(map(is_legacy_batched, tensors)):
        return torch.ops.metafast.sum_of_products(start, lefts, rights)
    result = start
    for left, right in present:
        result = torch.bmm(left, right) if result is None else torch.baddbmm(result, left, right)
    return result
