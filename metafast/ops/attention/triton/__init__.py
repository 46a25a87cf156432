"""Attention on GPUs, in Triton: forward, backward, forward mode, and forward over reverse for double backward.

Four raw ops without checks; whoever calls them has validated the arguments. They take

- ``query`` ``[*lead, Hq, Nq, D]``, ``key`` ``[*lead, Hk, Nk, D]``, ``value`` ``[*lead, Hk, Nk, Dv]``: one dtype
  (float16, bfloat16 or float32) and one device, any number of leading dimensions, any strides (tensors are copied where
  columns are not contiguous or leading dimensions cannot be joined), D and Dv up to 256. ``Hq`` is a multiple of
  ``Hk``; query head h reads key head ``h // (Hq // Hk)``.
- ``attn_mask`` None, boolean (True: may attend) or floating (added to the scores; at or below -1e30 it forbids like
  -inf), broadcastable to ``[*lead, Hq, Nq, Nk]`` and never expanded; ``is_causal``: query i sees keys j <= i.
- ``scale``, which multiplies the scores.

Products accumulate in float32; those of float32 inputs are exact in IEEE arithmetic unless torch allows TF32
(``torch.backends.cuda.matmul.fp32_precision``). Results are bitwise reproducible: nothing is summed by atomics.
"""

from metafast.ops.attention.triton.backward import backward
from metafast.ops.attention.triton.backward_jvp import backward_jvp
from metafast.ops.attention.triton.forward import forward
from metafast.ops.attention.triton.jvp import jvp

__all__ = ["backward", "backward_jvp", "forward", "jvp"]
