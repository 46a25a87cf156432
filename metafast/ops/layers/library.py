"""The ops as torch's dispatcher knows them.

The kernels of GELU and of layer normalisation are in ``csrc/cpu/layers/``, that of linear layers is in
``csrc/cpu/gemm/tasks.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


# start + sum of lefts[i] @ rights[i], batched; start may have one row for all.
define_with_out(_library, "sum_of_products(Tensor? start, Tensor[] lefts, Tensor[] rights) -> Tensor")


@torch.library.register_fake("metafast::sum_of_products", lib=_library)
def _(start: Tensor | None, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    return lefts[0].new_empty(*lefts[0].shape[:2], rights[0].shape[2])
