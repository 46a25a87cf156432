"""The masks of ``torch.nn.attention.bias``: tensors without entries, whose class says which keys a row may attend to."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from metafast.backend import constant_when_compiled

_MODULE = "torch.nn.attention.bias"


def is_causal_bias(attn_mask: Any) -> bool:
    """Whether ``causal_upper_left`` or ``causal_lower_right`` has made this mask."""
    return attn_mask is not None and isinstance(attn_mask, _classes())


@constant_when_compiled
def _classes() -> tuple[type, ...]:
    # Who has such a mask has imported the module, and with it torch._dynamo, which takes seconds.
    module = sys.modules.get(_MODULE)
    return () if module is None else (module.CausalBias,)


def right_of(bias: Any, query: Tensor, key: Tensor) -> int:
    """The mask as the right side of a window: row i attends to columns j ≤ i + that.

    Raises ValueError where the sizes of a mask are not the lengths. Where the side is 0 they may be others: torch does not
    read them then.
    """
    sizes = bias.seq_len_q, bias.seq_len_kv
    if bias.variant.name == "UPPER_LEFT" or sizes[0] == sizes[1]:
        return 0
    lengths = query.shape[-2], key.shape[-2]
    if sizes != lengths:
        raise ValueError(f"attn_mask: expected a causal bias of the lengths {lengths}, got one of {sizes}")
    return sizes[1] - sizes[0]
