"""Triton's interpreter as a stand-in for a GPU: mends the places where it computes something else than the hardware.

The kernels are run without a GPU under ``TRITON_INTERPRET=1``. Triton 3.6's interpreter then multiplies the bit
patterns of bfloat16 matrices as integers, sums a product in another order than its transpose, truncates when it rounds to
bfloat16 where a GPU rounds to the nearest even, reads loop bounds in a way that NumPy 2.4 refuses, and spends most of its
time patching ``triton.language`` anew at every call of a helper, although it stays patched. Nothing here has any effect
on compiled kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def mend_interpreter() -> None:
    """Replaces the faulty operations of the interpreter, once a process."""
    builder = interpreter.InterpreterBuilder
    patch_tensor, cast = interpreter._patch_lang_tensor, builder.cast_impl

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def cast_to_nearest(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), target.scalar)
        return cast(self, source, target)

    def dot_in_order(self: Any, left: Any, right: Any, total: Any, *_: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            left, right = (cast(self, operand, tl.float32) for operand in (left, right))
        # A BLAS, which np.matmul calls, sums in another order where operands are transposed. A row of dS with one key, zero
        # in the kernel over queries, would then be the rounding of dP in the one over keys.
        product = np.einsum("ij,jk->ik", left.data, right.data, dtype=total.data.dtype)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    patched_modules: set[str] = set()

    def call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched_modules:
            patched_modules.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patched_tensor
    interpreter.InterpretedFunction.__call__ = call_helper
    builder.cast_impl, builder.create_dot = cast_to_nearest, dot_in_order
