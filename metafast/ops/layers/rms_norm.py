"""``torch.rms_norm``, right in forward mode too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metafast.ops.functions import is_forward_mode
from metafast.ops.layers import norm_reference as reference

_torch_rms_norm = torch.rms_norm


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``torch.rms_norm``; in forward mode without torch's own derivative, which is wrong there (pytorch#196700).

    Args:
        input: ``[*, *normalized_shape]``.
        normalized_shape: sizes of the last dimensions, whose mean square becomes 1.
        weight: ``[*normalized_shape]`` or None.
        eps: added to the mean square; None: the precision of the type that it is computed in.
    """
    shape = tuple(normalized_shape)
    fits = shape and tuple(input.shape[-len(shape) :]) == shape and (weight is None or tuple(weight.shape) == shape)
    if fits and is_forward_mode():
        return reference.rms_norm(input, len(shape), weight, eps)
    return _torch_rms_norm(input, normalized_shape, weight, eps)
