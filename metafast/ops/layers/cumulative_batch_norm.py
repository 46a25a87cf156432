"""Batch norm whose running statistics are averages over all batches (``momentum=None``), without a look at their number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

torch_forward = _BatchNorm.forward


def forward(module: _BatchNorm, input: Tensor) -> Tensor:
    """``_BatchNorm.forward``, whose factor 1 / number of batches stays a tensor.

    Torch makes a Python number of it, which a recording cannot: the factor is another one at every replay.
    """
    mean, var, batches = module.running_mean, module.running_var, module.num_batches_tracked
    counts = module.training and module.track_running_stats and module.momentum is None
    if not counts or mean is None or var is None or batches is None:
        return torch_forward(module, input)
    module._check_input_dim(input)
    batches.add_(1)
    # With momentum 1 the kernel leaves the statistics of the batch.
    of_batch = torch.zeros_like(mean), torch.zeros_like(var)
    out = F.batch_norm(input, *of_batch, module.weight, module.bias, True, 1.0, module.eps)
    with torch.no_grad():
        for running, new in zip((mean, var), of_batch, strict=True):
            running.copy_(running + (new - running) / batches.to(running.dtype))
    return out
