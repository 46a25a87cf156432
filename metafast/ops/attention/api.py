from __future__ import annotations

import math

import torch
from torch import Tensor

from metafast.backend import resolve_backend
from metafast.ops.attention import autograd, reference
from metafast.ops.attention.validation import check_arguments, reasons_against_fused


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
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, exact to second order in every mode of differentiation.

    softmax(scale Q Kᵀ + mask) V (Vaswani et al. 2017, equation 1). The fused path needs memory linear in the lengths
    for values, first and second derivatives, and composes with ``create_graph=True`` and ``torch.func``
    (``grad``, ``vmap``, ``jvp``, ``vjp``, ``jacrev``, ``jacfwd``, ``hessian``); a third derivative raises
    NotImplementedError there, and works with ``backend="reference"``.

    Args:
        query: ``[..., Hq, Nq, D]``, floating.
        key: ``[..., Hk, Nk, D]``, same dtype and device; leading dimensions broadcast.
        value: ``[..., Hk, Nk, Dv]``; ``Dv`` may differ from ``D``.
        attn_mask: broadcastable to ``[..., Hq, Nq, Nk]``: boolean, True where attention is allowed, or floating, added to
            the scores. A row that may attend to nothing gives zeros.
        dropout_p: probability of dropping an attention weight; applied whenever positive, as torch's op does.
        is_causal: row i attends to columns j ≤ i (aligned at the top left), besides what ``attn_mask`` allows.
        scale: factor of the scores, ``1 / sqrt(D)`` where None.
        enable_gqa: allow ``Hk`` to be a divisor of ``Hq``; query head h then reads key head ``h // (Hq // Hk)``.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``; None takes :class:`metafast.use_backend`'s choice.

    Returns:
        ``[..., Hq, Nq, Dv]`` in query's dtype.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        BackendUnavailableError: ``"fused"`` was asked for and cannot serve the call.
    """
    query, key, value = _autocast(query, key, value)
    check_arguments(query, key, value, attn_mask, dropout_p, enable_gqa)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    reasons = reasons_against_fused(query, value, attn_mask, dropout_p)
    if resolve_backend("scaled_dot_product_attention", backend, reasons) == "reference":
        headless = query.ndim == 2
        if headless:
            query, key, value = query[None], key[None], value[None]
        out = reference.attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return out[0] if headless else out
    return _fused(query, key, value, attn_mask, is_causal, scale)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    if query.ndim == 2:
        return _fused(query[None], key[None], value[None], attn_mask, is_causal, scale)[0]
    lead = query.shape[:-3]
    if key.shape[:-3] != lead or value.shape[:-3] != lead:
        lead = torch.broadcast_shapes(lead, key.shape[:-3], value.shape[:-3])
        query, key, value = (x.expand(*lead, *x.shape[-3:]) for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return autograd.attention(query, key, value, attn_mask, is_causal, scale)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch's autocast does for its own op: floating inputs in its lower precision, float64 left alone."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST_FROM else x for x in tensors)


_AUTOCAST_FROM = (torch.float16, torch.bfloat16, torch.float32)
