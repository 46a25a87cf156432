"""Whether a layer op runs its kernels; the rule is in README.md."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from metafast.backend import extension_problem, logger, requested_backend
from metafast.ops.functions import is_forward_over_forward


def runs_kernels(op: str, *tensors: Tensor) -> bool:
    """Whether ``op`` runs its kernels on these tensors. The log says why not, at debug level, once for each reason."""
    reason = reason_against_kernels(*tensors)
    if reason is not None and logger.isEnabledFor(logging.DEBUG) and not torch.compiler.is_compiling():
        _log_once(op, reason)
    return reason is None


def reason_against_kernels(*tensors: Tensor) -> str | None:
    """The first reason why the kernels cannot serve these tensors; None where they can."""
    if torch.compiler.is_compiling():
        return "torch.compile generates the code"
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64):
        return f"no kernel for {dtype}"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"no kernel for device {tensor.device.type!r}"
        if tensor.dtype != dtype:
            return f"no kernel for {dtype} beside {tensor.dtype}"
    if requested_backend() == "reference":
        return "the reference backend is asked for"
    if is_forward_over_forward():
        return "forward mode over forward mode"
    return extension_problem()


@functools.cache
def _log_once(op: str, reason: str) -> None:
    logger.debug("%s runs torch's own op: %s", op, reason)
