"""The ops as torch's dispatcher knows them; their kernels are in ``csrc/cpu/layers/gelu.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast.ops.schemas import define_with_out

_library = torch.library.Library("metafast", "FRAGMENT")
define_with_out(_library, "gelu_backward(Tensor grad, Tensor input) -> Tensor")
define_with_out(_library, "gelu_double_backward(Tensor grad, Tensor input, Tensor tangent) -> (Tensor, Tensor)")


@torch.library.register_fake("metafast::gelu_backward", lib=_library)
def _(grad: Tensor, input: Tensor) -> Tensor:
    return torch.empty_like(input.contiguous())


@torch.library.register_fake("metafast::gelu_double_backward", lib=_library)
def _(grad: Tensor, input: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    like = input.contiguous()
    return torch.empty_like(like), torch.empty_like(like)
