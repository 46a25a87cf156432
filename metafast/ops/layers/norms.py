"""Normalisations of channels as ``torch`` has them, by elementary operations in forward mode; see README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast.ops.functions import is_forward_mode
from metafast.ops.layers import norm_reference as reference

_torch_batch_norm = torch.batch_norm
_torch_instance_norm = torch.instance_norm
_torch_group_norm = torch.group_norm


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """``torch.batch_norm``: over all but dimension 1 of ``[B, C, *]``, whose running statistics it updates in training."""
    rest = (running_mean, running_var, training, momentum, eps, cudnn_enabled)
    if not (training and is_forward_mode() and _is_of_channels(input, weight, bias, running_mean, running_var)):
        return _torch_batch_norm(input, weight, bias, *rest)
    if running_mean is not None or running_var is not None:
        _torch_batch_norm(input.detach(), None, None, *rest)
    return reference.batch_norm(input, weight, bias, eps)


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """``torch.instance_norm``: over all but the first two dimensions of ``[B, C, *]``."""
    rest = (running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled)
    if not (use_input_stats and is_forward_mode() and _is_of_channels(input, weight, bias, running_mean, running_var)):
        return _torch_instance_norm(input, weight, bias, *rest)
    if running_mean is not None or running_var is not None:
        _torch_instance_norm(input.detach(), None, None, *rest)
    return reference.instance_norm(input, weight, bias, eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """``torch.group_norm``: over groups of the channels and all that is in them, of ``[B, C, *]``."""
    if is_forward_mode() and _is_of_channels(input, weight, bias) and input.shape[1] % num_groups == 0:
        return reference.group_norm(input, num_groups, weight, bias, eps)
    return _torch_group_norm(input, num_groups, weight, bias, eps, cudnn_enabled)


def _is_of_channels(input: Tensor, *others: Tensor | None) -> bool:
    """Whether shapes are as they must be; torch's own op says what is wrong with them where they are not."""
    return (
        input.ndim > 1
        and input.numel() > 0
        and all(tensor is None or tensor.shape == input.shape[1:2] for tensor in others)
    )
