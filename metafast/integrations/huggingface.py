"""``attn_implementation="metafast"`` for Hugging Face transformers 4.53 and later.

    metafast.integrations.huggingface.register()
    model = AutoModel.from_pretrained(name, attn_implementation="metafast")

Attention is :func:`metafast.scaled_dot_product_attention`: exact to second order, grouped heads without expanding keys and
values, and batched over tasks. The mask is made without looking at its values, which ``torch.func.vmap`` does not allow:
transformers' own mask code asks whether anything is padded at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafast.ops.attention import scaled_dot_product_attention

__all__ = ["register"]

NAME = "metafast"


def register() -> None:
    """Registers attention and mask under ``"metafast"``. A second call does nothing new.

    Raises:
        ImportError: transformers is missing or older than 4.53.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"metafast.integrations.huggingface: expected transformers >= 4.53 ({error})") from error

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that a model's attention module calls; ``query [B, Hq, Nq, D]``, ``key`` and ``value [B, Hk, Nk, D]``.

    Returns:
        ``[B, Nq, Hq, D]``, and None instead of attention weights, which are never computed. Where a model asks for them, the
        log of transformers says so once.

    Raises:
        ValueError: the model asks for what this attention does not do (``softcap``, sink tokens).
    """
    for option in ("softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise ValueError(f"{option}: not supported by the attention implementation {NAME!r}; use 'eager'")
    if kwargs.get("output_attentions") or _weights_are_collected():
        _warn_of_output_attentions()
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # With a mask, causality is in it; a single query is the last token of a decoder and sees everything before it.
    is_causal = bool(is_causal) and attention_mask is None and query.shape[-2] > 1
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask, query.dtype)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=key.shape[-3] != query.shape[-3],
    )
    return out.transpose(-2, -3).contiguous(), None


def mask(**arguments: Any) -> Tensor | None:
    """The boolean mask of transformers (True: may attend), left out only where shapes alone allow it."""
    from transformers.masking_utils import sdpa_mask

    if arguments.get("attention_mask") is not None:
        arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**arguments)


def _weights_are_collected() -> bool:
    """Whether a model of transformers 5 that keeps the option from its attention modules was called with it."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    return any(name.endswith("attentions") for name in _active_collector.get() or ())


def _warn_of_output_attentions() -> None:
    from transformers.utils import logging

    logging.get_logger("transformers.integrations.metafast").warning_once(
        f"output_attentions=True: the attention implementation {NAME!r} computes no attention weights, and gives none; "
        "model.set_attn_implementation('eager') does"
    )


def _biased(position_bias: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A learned bias of the scores (T5's relative positions) and the mask as one additive mask."""
    bias = position_bias.to(dtype)
    if attention_mask is None:
        return bias
    if attention_mask.dtype == torch.bool:
        return bias.masked_fill(~attention_mask, -torch.inf)
    return bias + attention_mask
