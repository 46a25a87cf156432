"""What attention accepts, and why the fused path cannot take a call that is otherwise valid."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from metafast.backend import extension_problem, triton_problem
from metafast.ops.attention.causal_bias import is_causal_bias
from metafast.ops.attention.options import NO_LIMIT
from metafast.ops.functions import is_forward_over_forward

FUSED_DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}
# The Triton kernels hold a whole head dimension in registers.
MAX_CUDA_HEAD_DIM = 256


WindowSize: TypeAlias = tuple[int | None, int | None]


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> None:
    """Raises TypeError or ValueError, naming the argument, what was expected and what came."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim < 2:
            raise ValueError(
                f"{name}: expected at least 2 dimensions [..., length, head_dim], got shape {_shape(tensor)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected query's device {query.device}, got {tensor.device}")
        if enable_gqa and tensor.ndim < 3:
            raise ValueError(
                f"{name}: expected at least 3 dimensions [..., heads, length, head_dim] with enable_gqa=True, got shape "
                f"{_shape(tensor)}"
            )
    if query.shape[-1] == 0:
        raise ValueError(f"query: expected a head dimension of at least 1, got shape {_shape(query)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: expected query's head dimension {query.shape[-1]}, got shape {_shape(key)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value: expected key's length {key.shape[-2]}, got shape {_shape(value)}")
    _check_heads(query, key, value, enable_gqa)
    if attn_mask is not None and not is_causal_bias(attn_mask):
        _check_mask(query, key, attn_mask)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    heads = _heads(query)
    for name, tensor, others in (("key", key, (query,)), ("value", value, (query, key))):
        own = _heads(tensor)
        if enable_gqa:
            if own == 0 or heads % own:
                raise ValueError(
                    f"{name}: expected a number of heads that divides query's {heads}, got shape {_shape(tensor)}"
                )
        elif own != 1 and any(_heads(other) not in (1, own) for other in others):
            raise ValueError(
                f"{name}: expected query's {heads} heads (dimension -3) or one, unless enable_gqa=True, got shape "
                f"{_shape(tensor)}"
            )
        try:
            torch.broadcast_shapes(*(x.shape[:-3] for x in (tensor, *others)))
        except RuntimeError:
            raise ValueError(
                f"{name}: expected leading dimensions that broadcast with "
                + " and ".join(f"{of}'s {_shape(x)}" for of, x in zip(("query", "key"), others, strict=False))
                + f", got {_shape(tensor)}"
            ) from None


def _heads(tensor: Tensor) -> int:
    return tensor.shape[-3] if tensor.ndim > 2 else 1


def _check_mask(query: Tensor, key: Tensor, attn_mask: Tensor) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask: expected dtype torch.bool or a floating dtype, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask: expected query's device {query.device}, got {attn_mask.device}")
    # Of the scores: what values are broadcast to comes after.
    heads = () if query.ndim == key.ndim == 2 else (_heads(query) if _heads(query) != 1 else _heads(key),)
    full = (*torch.broadcast_shapes(query.shape[:-3], key.shape[:-3]), *heads, query.shape[-2], key.shape[-2])
    try:
        fits = torch.broadcast_shapes(attn_mask.shape, full) == torch.Size(full)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {full}, got {_shape(attn_mask)}")


def checked_window(window_size: WindowSize | None, is_causal: bool, query_offset: int) -> tuple[int, int]:
    """Left and right of ``Options``: counted from a row's number, where the caller's count from its position.

    Raises TypeError or ValueError.
    """
    if isinstance(query_offset, bool) or not isinstance(query_offset, int):
        raise TypeError(f"query_offset: expected an integer, got {query_offset!r}")
    left, right = _checked_sides(window_size)
    if is_causal:
        right = 0
    return _shifted(left, -query_offset), _shifted(right, query_offset)


def checked_ranges(
    key_start: Tensor | None, key_length: Tensor | None, lead: torch.Size, columns: int, device: torch.device
) -> Tensor | None:
    """``key_ranges`` of the options: which keys exist, in tensors whose leading dimensions are ``lead``.

    Raises TypeError or ValueError. Numbers are not looked at, which would wait for a GPU; they are cut to the keys.
    """
    for name, tensor in (("key_start", key_start), ("key_length", key_length)):
        if tensor is not None:
            _check_numbers_of_lead(name, tensor, lead, device)
    if key_start is None:
        if key_length is None:
            return None
        key_start = torch.zeros_like(key_length)
    begin = key_start.to(torch.int64).clamp(-NO_LIMIT, NO_LIMIT)
    end = (
        torch.full_like(begin, columns) if key_length is None else begin + key_length.to(torch.int64).clamp(0, NO_LIMIT)
    )
    ranges = torch.stack(torch.broadcast_tensors(begin, end), -1).clamp(0, columns)
    return ranges.expand(*lead, 2)


def _check_numbers_of_lead(name: str, tensor: Tensor, lead: torch.Size, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(tensor).__name__}")
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: expected an integer dtype, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected query's device {device}, got {tensor.device}")
    try:
        fits = torch.broadcast_shapes(tensor.shape, lead) == lead
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to the leading dimensions {tuple(lead)}, which are all but heads, "
            f"length and head_dim, got {_shape(tensor)}"
        )


def _shifted(side: int | None, offset: int) -> int:
    return NO_LIMIT if side is None else max(-NO_LIMIT, min(side + offset, NO_LIMIT))


def _checked_sides(window_size: WindowSize | None) -> tuple[int | None, int | None]:
    """Left and right of a window, None where there is no limit."""
    if window_size is None:
        return None, None
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size: expected a pair (left, right), got {window_size!r}")
    sides: list[int | None] = []
    for side in window_size:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"window_size: expected integers or None, got {window_size!r}")
        if side is not None and side < -1:
            raise ValueError(f"window_size: expected numbers of at least 0, or -1 for no limit, got {window_size!r}")
        sides.append(None if side == -1 else side)
    return sides[0], sides[1]


def reasons_against_fused(query: Tensor, value: Tensor) -> list[str]:
    """Every reason why the fused kernels cannot serve this call; empty where they can."""
    reasons = []
    device = query.device.type
    if device not in FUSED_DTYPES:
        return [f"no kernels for device {device!r}"]
    if query.dtype not in FUSED_DTYPES[device]:
        reasons.append(f"no {device} kernel for {query.dtype}")
    problem = extension_problem() if device == "cpu" else triton_problem()
    if problem is not None:
        reasons.append(problem)
    if device == "cuda" and max(query.shape[-1], value.shape[-1]) > MAX_CUDA_HEAD_DIM:
        reasons.append(f"head dimensions over {MAX_CUDA_HEAD_DIM}")
    if is_forward_over_forward():
        reasons.append("forward mode over forward mode (take one of the derivatives in reverse mode)")
    return reasons


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
