"""Attention on GPUs, in Triton: forward, backward, forward mode, and forward over reverse for double backward.

Six raw ops without checks; whoever calls them has validated the arguments. They take

- ``query`` ``[*lead, Hq, Nq, D]``, ``key`` ``[*lead, Hk, Nk, D]``, ``value`` ``[*lead, Hk, Nk, Dv]``: one dtype
  (float16, bfloat16 or float32) and one device, any number of leading dimensions, any strides (tensors are copied where
  columns are not contiguous or leading dimensions cannot be joined), D and Dv up to 256. ``Hq`` is a multiple of
  ``Hk``; query head h reads key head ``h // (Hq // Hk)``.
- ``attn_mask`` None, boolean (True: may attend) or floating (added to the scores), of as many dimensions as the scores
  ``[*lead, Hq, Nq, Nk]``, each of them full or 1, and never expanded. A row that may attend to nothing gives zeros.
- ``seeds`` of dropout, int64 ``[*lead]``, or None without dropout.
- ``key_ranges``, int64 ``[*lead, 2]``: the first key that exists, and the one after the last; or None where all do.
- the numbers among the options, :class:`metafast.ops.attention.options.Options`.

``attn_mask``, ``seeds``, ``key_ranges`` and the numbers end the arguments of each op.

Products accumulate in float32; those of float32 inputs are exact in IEEE arithmetic unless torch allows TF32
(``torch.backends.cuda.matmul.fp32_precision``). Results are bitwise reproducible: nothing is summed by atomics.
"""

from metafast.ops.attention.triton.backward import backward
from metafast.ops.attention.triton.backward_jvp import backward_jvp
from metafast.ops.attention.triton.forward import forward
from metafast.ops.attention.triton.jvp import jvp
from metafast.ops.attention.triton.mask_backward import mask_backward, mask_backward_jvp

__all__ = ["backward", "backward_jvp", "forward", "jvp", "mask_backward", "mask_backward_jvp"]
