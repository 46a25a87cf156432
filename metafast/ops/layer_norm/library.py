"""The ops as torch's dispatcher knows them; their kernels are in ``csrc/cpu/layers/layer_norm.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast.ops.schemas import define_with_out

_library = torch.library.Library("metafast", "FRAGMENT")
for _schema in (
    "layer_norm_forward(Tensor input, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    "layer_norm_backward(Tensor grad, Tensor input, Tensor weight, Tensor statistics) -> (Tensor, Tensor, Tensor)",
    "layer_norm_backward_jvp(Tensor grad, Tensor input, Tensor weight, Tensor statistics, Tensor tangent_input, "
    "Tensor tangent_weight, Tensor tangent_bias) -> (Tensor, Tensor, Tensor)",
):
    define_with_out(_library, _schema)


@torch.library.register_fake("metafast::layer_norm_forward", lib=_library)
def _(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), input.new_empty((*input.shape[:-1], 2))


@torch.library.register_fake("metafast::layer_norm_backward", lib=_library)
def _(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return input.new_empty(input.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@torch.library.register_fake("metafast::layer_norm_backward_jvp", lib=_library)
def _(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return input.new_empty(input.shape), input.new_empty(input.shape), weight.new_empty(weight.shape)
