"""The op as torch's dispatcher knows it; its kernel is in ``csrc/cpu/gemm/tasks.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metafast.ops.schemas import define_with_out

_library = torch.library.Library("metafast", "FRAGMENT")
# start + sum of lefts[i] @ rights[i], batched; start may have one row for all.
define_with_out(_library, "sum_of_products(Tensor? start, Tensor[] lefts, Tensor[] rights) -> Tensor")


@torch.library.register_fake("metafast::sum_of_products", lib=_library)
def _(start: Tensor | None, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    return lefts[0].new_empty(*lefts[0].shape[:2], rights[0].shape[2])
