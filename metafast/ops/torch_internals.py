"""Every private name of torch that the ops use: what to look at when a new torch comes out."""

from __future__ import annotations

import torch
from torch._functorch import autograd_function as _autograd_function

_functorch = torch._C._functorch

# What a Function's vmap is told: batch size and randomness.
VmapInfo = _autograd_function.VmapInfo
# Whether a transform of torch.func is entered.
are_transforms_active = torch._C._are_functorch_transforms_active
# The transforms that are entered, from the outermost to the innermost; None without any.
transforms = _functorch.get_interpreter_stack
# The innermost of them.
innermost_transform = _functorch.peek_interpreter_stack
# What kind of transform one is.
TransformType = _functorch.TransformType
# A transform that is a vmap, with its batch size and its randomness.
VmapTransform = _functorch.CVmapInterpreterPtr
# How a vmap treats random numbers.
RandomnessType = _functorch.RandomnessType
# Leaves the innermost transform for a while, and enters it again.
leave_transform = _functorch.pop_dynamic_layer_stack
enter_transform = _functorch.push_dynamic_layer_stack
# A tensor of a vmap's level as the tensor that holds the batch, with the batch's dimension; and back.
unwrap_batched = _functorch._unwrap_batched
wrap_batched = _functorch._add_batch_dim
# What a tensor is wrapped in: a vmap, forward or reverse mode of torch.func, functionalisation, any of these; and the level.
is_batched = _functorch.is_batchedtensor
is_tracking_gradients = _functorch.is_gradtrackingtensor
is_functional = _functorch.is_functionaltensor
is_wrapped = _functorch.is_functorch_wrapped_tensor
level_of = _functorch.maybe_get_level
# The level of the innermost transform; None outside of all.
current_level = _functorch.maybe_current_level
# What is in a wrapper whose transform is over.
unwrap_if_dead = _functorch.unwrap_if_dead
# Whether a tensor is of the older vmap, which torch.autograd.grad(is_grads_batched=True) uses.
is_legacy_batched = _functorch.is_legacy_batchedtensor
# Inside, an op runs its kernel, and records nothing for autograd.
below_autograd = torch._C._AutoDispatchBelowAutograd
# Whether the backward pass that runs now will come to a node.
will_run_node = torch._C._will_engine_execute_node
# Inside, writes to a tensor give it no new version.
preserving_version = torch.autograd.grad_mode._unsafe_preserve_version_counter
# Whether the backward pass that runs now leaves its graph for another one.
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
# Whether oneDNN multiplies matrices of these types with instructions for them on this CPU.
multiplies_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported
multiplies_float16 = torch.ops.mkldnn._is_mkldnn_fp16_supported
# What a tensor can be asked about itself, its values apart, as modes and subclasses see it. The answers are no tensors.
QUESTIONS = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "_version")
    ),
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("is_cuda", "is_cpu", "is_sparse", "is_nested", "is_meta", "is_leaf", "is_quantized")
    ),
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.element_size),
    *(torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.get_device),
}


def forward_mode_level() -> int:
    """The level of forward mode that is entered, by torch.func.jvp or torch.autograd.forward_ad; -1 for none."""
    return torch.autograd.forward_ad._current_level
