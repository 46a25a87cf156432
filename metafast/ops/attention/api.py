from __future__ import annotations

import math

import torch
from torch import Tensor

from metafast.backend import constant_when_compiled, resolve_backend
from metafast.ops.attention import autograd, reference
from metafast.ops.attention.causal_bias import is_causal_bias, right_of
from metafast.ops.attention.options import Options, shared_options
from metafast.ops.attention.shapes import aligned
from metafast.ops.attention.validation import (
    WindowSize,
    check_arguments,
    checked_ranges,
    checked_window,
    reasons_against_fused,
)

_LAST_SEED = 2**63 - 1


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: WindowSize | None = None,
    query_offset: int = 0,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, exact to second order in every mode of differentiation.

    softmax(scale Q Kᵀ + mask) V (Vaswani et al. 2017, equation 1). The fused path needs memory linear in the lengths
    for values, first and second derivatives, and composes with ``create_graph=True`` and ``torch.func``
    (``grad``, ``vmap``, ``jvp``, ``vjp``, ``jacrev``, ``jacfwd``, ``hessian``); a third derivative raises
    NotImplementedError there, and works with ``backend="reference"``.

    Args:
        query: ``[..., Hq, Nq, D]``, floating.
        key: ``[..., Hk, Nk, D]``, same dtype and device. All but the last two dimensions broadcast with query's and value's:
            heads may be one beside many, and dimensions may be missing.
        value: ``[..., Hv, Nk, Dv]``; ``Dv`` may differ from ``D``.
        attn_mask: broadcastable to ``[..., Hq, Nq, Nk]``: boolean, True where attention is allowed, or floating, added to
            the scores and differentiable. A row that may attend to nothing gives zeros. Or what
            ``torch.nn.attention.bias.causal_upper_left`` and ``causal_lower_right`` return, which become no mask.
        dropout_p: probability of dropping an attention weight; applied whenever positive, as torch's op does. The weights
            that are dropped follow from seeds that torch's generator of the device draws, one for each index of the
            leading dimensions: the same in every pass, on every backend, and again after ``torch.manual_seed``.
        is_causal: row i attends to columns j ≤ i + ``query_offset``, besides what ``attn_mask`` allows.
        scale: factor of the scores, ``1 / sqrt(D)`` where None.
        enable_gqa: ``Hk`` and ``Hv`` may be any divisors of ``Hq``; query head h then reads key head ``h // (Hq // Hk)`` and
            value head ``h // (Hq // Hv)``. All have that dimension.
        window_size: ``(left, right)``: row i attends to columns p − left ≤ j ≤ p + right only, where p is
            i + ``query_offset``; None or −1 in it means no limit on that side.
        query_offset: the position of the first row among the keys, for ``is_causal`` and ``window_size``. 0 aligns them at
            the top left, ``Nk − Nq`` at the bottom right, as for the last queries of a longer sequence. It may be
            negative, and beyond the last key; a row that has no key to attend to gives zeros.
        key_start, key_length: integer tensors that broadcast to the leading dimensions (all but heads, length and head
            dimension): keys and values ``key_start`` ≤ j < ``key_start + key_length`` exist and no others, as in a padded
            batch or a cache. None: from the first on, up to the last. A range may reach beyond the keys, or be empty, which
            gives zeros. Positions count from key 0, whether it exists or not. Keys and values that do not exist have zero
            derivatives; their entries have to be finite, as under a mask.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``; None takes :class:`metafast.use_backend`'s choice.

    Returns:
        ``[..., H, Nq, Dv]`` in query's dtype, where H is ``Hq``, or what the heads broadcast to.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        BackendUnavailableError: ``"fused"`` was asked for and cannot serve the call.
    """
    query, key, value = _autocast(query, key, value)
    check_arguments(query, key, value, attn_mask, dropout_p, enable_gqa)
    left, right = checked_window(window_size, is_causal, query_offset)
    if is_causal_bias(attn_mask):
        right, attn_mask = min(right, right_of(attn_mask, query, key)), None
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    reasons = reasons_against_fused(query, value)
    fused = resolve_backend("scaled_dot_product_attention", backend, reasons) == "fused"
    matrices = query.ndim == key.ndim == value.ndim == 2
    query, key, value = aligned(query, key, value, enable_gqa)
    if attn_mask is not None:
        # Its broadcast dimensions stay of size 1: so does its gradient.
        attn_mask = attn_mask.reshape((1,) * (query.ndim - attn_mask.ndim) + attn_mask.shape)
    lead = query.shape[:-3]
    key_ranges = checked_ranges(key_start, key_length, lead, key.shape[-2], query.device)
    if query.shape[-3] == 0:
        return (query.sum() + key.sum() + value.sum()).expand(*query.shape[:-1], value.shape[-1])
    seeds = torch.randint(_LAST_SEED, lead, device=query.device) if dropout_p > 0.0 else None
    function = autograd.attention if fused else reference.attention
    make_options = Options if torch.compiler.is_compiling() else shared_options
    out = function(query, key, value, attn_mask, seeds, key_ranges, make_options(left, right, dropout_p, scale))
    return out[0] if matrices else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch's autocast does for its own op: floating inputs in its lower precision, float64 left alone."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST_FROM else x for x in tensors)


@constant_when_compiled
def _has_autocast(device: str) -> bool:
    # Dynamo cannot trace torch's own function up to torch 2.11.
    return torch.amp.is_autocast_available(device)


_AUTOCAST_FROM = (torch.float16, torch.bfloat16, torch.float32)
