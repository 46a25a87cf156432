"""The case table of attention, and how a result is compared: what tests and benchmarks share.

Users who write a backend or change a kernel run the same cases against :mod:`metafast.ops.attention.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AttentionFn = Callable[..., Tensor]
# The outputs of a second-order step, in the order that second_order() returns them.
SECOND_ORDER_OUTPUTS = ("out", "grad_query", "grad_key", "grad_value", "gg_query", "gg_key", "gg_value", "gg_grad_out")
# And of one that differentiates by an additive mask too.
MASK_OUTPUTS = (*SECOND_ORDER_OUTPUTS[:4], "grad_mask", *SECOND_ORDER_OUTPUTS[4:7], "gg_mask", "gg_grad_out")
# Dropout's seeds are drawn after this one.
SEED = 7


@dataclass(frozen=True)
class AttentionCase:
    """A shape, a mask and a memory order; inputs are drawn fresh from a generator.

    Masks whose names begin with "bias" are differentiated too.
    """

    name: str
    rows: int
    columns: int
    head_dim: int
    value_dim: int | None = None
    lead: tuple[int, ...] = (2,)
    heads: int = 2
    key_heads: int | None = None
    mask: str | None = None
    is_causal: bool = False
    transposed: bool = False
    scale: float | None = None
    key_offset: float = 0.0
    dropout_p: float = 0.0
    window_size: tuple[int | None, int | None] | None = None
    query_offset: int = 0
    # Whether key_start and key_length are drawn; some of the keys that they let exist are none.
    has_start: bool = False
    has_length: bool = False

    def inputs(self, dtype: torch.dtype, generator: torch.Generator, device: str = "cpu") -> AttentionInputs:
        key_heads = self.key_heads or self.heads
        value_dim = self.value_dim or self.head_dim

        def draw(heads: int, length: int, width: int) -> Tensor:
            if self.transposed:
                return _normal((*self.lead, length, heads, width), generator).transpose(-2, -3)
            return _normal((*self.lead, heads, length, width), generator)

        query = draw(self.heads, self.rows, self.head_dim)
        key = draw(key_heads, self.columns, self.head_dim) + self.key_offset
        value = draw(key_heads, self.columns, value_dim)
        tangents = tuple(_normal(tuple(x.shape), generator) for x in (query, key, value))
        grad_out = _normal((*query.shape[:-1], value_dim), generator)
        mask = self._mask(generator)
        start, length = self._start_and_length(generator)
        tangent_mask = _normal(tuple(mask.shape), generator) if mask is not None and self.differentiates_mask else None
        if mask is not None:
            mask = mask.to(device, torch.bool if mask.dtype == torch.bool else dtype)
        query, key, value, grad_out = (x.to(device, dtype) for x in (query, key, value, grad_out))
        return AttentionInputs(
            query,
            key,
            value,
            grad_out,
            tuple(x.to(device, dtype) for x in tangents),
            None if tangent_mask is None else tangent_mask.to(device, dtype),
            {
                "attn_mask": mask,
                "dropout_p": self.dropout_p,
                "is_causal": self.is_causal,
                "scale": self.scale,
                "enable_gqa": key_heads != self.heads,
                "window_size": self.window_size,
                "query_offset": self.query_offset,
                "key_start": None if start is None else start.to(device),
                "key_length": None if length is None else length.to(device),
            },
        )

    @property
    def differentiates_mask(self) -> bool:
        return self.mask is not None and self.mask.startswith("bias")

    def _start_and_length(self, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        start, length = None, None
        if self.has_start:
            # The same for all but the last of the leading dimensions; perhaps before the first key.
            start = torch.randint(-2, self.columns, self.lead[-1:], generator=generator)
        if self.has_length:
            length = torch.randint(1, self.columns + 2, self.lead, generator=generator, dtype=torch.int32)
            length.view(-1)[-1:] = 0
        return start, length

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        shape = {
            None: (),
            "full": (*self.lead, self.heads, self.rows, self.columns),
            "rows": (self.rows, self.columns),
            "padding": (*self.lead, 1, 1, self.columns),
            "additive": (*self.lead, 1, self.rows, self.columns),
            "additive padding": (*self.lead, 1, 1, self.columns),
            "lowest": (*self.lead, 1, self.rows, self.columns),
            "bias": (*self.lead, self.heads, self.rows, self.columns),
            "bias of heads": (self.heads, self.rows, self.columns),
            "bias of keys": (*self.lead, 1, 1, self.columns),
            "bias of a row": (self.columns,),
        }[self.mask]
        if self.mask is None:
            return None
        keep = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.7
        if self.mask == "full":
            keep[..., self.rows // 2, :] = False
        if "padding" in self.mask:
            keep = torch.arange(self.columns).expand(shape) < self.columns - 3
        if self.mask == "lowest":
            # The lowest finite number is added, not obeyed: a row of nothing else attends to all keys alike.
            keep[..., self.rows // 2, :] = False
            return torch.zeros(shape, dtype=torch.float64).masked_fill(~keep, torch.finfo(torch.float32).min)
        if self.mask.startswith("bias"):
            bias = _normal(shape, generator)
            # Some are forbidden for good, as in a learned bias under a causal mask.
            return bias.masked_fill(~keep, -torch.inf)
        if self.mask.startswith("additive"):
            return _normal(shape, generator).masked_fill(~keep, -torch.inf)
        return keep


@dataclass(frozen=True)
class AttentionInputs:
    """``function(query, key, value, **options)``, a cotangent of its output and directions for its inputs.

    ``tangent_mask`` is None unless the mask is differentiated.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    tangents: tuple[Tensor, ...]
    tangent_mask: Tensor | None
    options: dict[str, Any]

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same numbers in another dtype: exact upwards, so that float64 says what the lower dtype should have given."""
        mask = self.options["attn_mask"]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype)
        query, key, value, grad_out = (x.to(dtype) for x in (*self.qkv, self.grad_out))
        tangents = tuple(x.to(dtype) for x in self.tangents)
        tangent_mask = None if self.tangent_mask is None else self.tangent_mask.to(dtype)
        return AttentionInputs(query, key, value, grad_out, tangents, tangent_mask, {**self.options, "attn_mask": mask})


ATTENTION_CASES = (
    AttentionCase("plain", 16, 16, 8),
    AttentionCase("ragged", 13, 9, 5, value_dim=7),
    AttentionCase("cross", 33, 70, 16, value_dim=24),
    AttentionCase("one query", 1, 37, 16),
    AttentionCase("one key", 5, 1, 4),
    AttentionCase("one dimension", 11, 12, 1, value_dim=3),
    AttentionCase("no lead", 12, 12, 8, lead=()),
    AttentionCase("two leads", 12, 10, 8, lead=(2, 3)),
    AttentionCase("causal", 40, 40, 16, is_causal=True),
    AttentionCase("causal, more rows", 41, 23, 16, is_causal=True),
    AttentionCase("causal, more columns", 23, 41, 16, is_causal=True),
    AttentionCase("mask with an empty row", 20, 19, 8, mask="full"),
    AttentionCase("mask of rows", 20, 19, 8, mask="rows"),
    AttentionCase("padding", 20, 19, 8, mask="padding"),
    AttentionCase("additive", 20, 19, 8, mask="additive"),
    AttentionCase("additive padding", 20, 19, 8, mask="additive padding"),
    AttentionCase("causal padding", 24, 24, 8, mask="padding", is_causal=True),
    AttentionCase("transposed views", 17, 18, 16, transposed=True),
    AttentionCase("grouped heads", 15, 14, 8, heads=6, key_heads=2),
    AttentionCase("one key head, causal", 15, 15, 8, heads=4, key_heads=1, is_causal=True, transposed=True),
    AttentionCase("scale", 12, 13, 8, scale=0.7),
    AttentionCase("keys with an offset", 30, 31, 16, key_offset=30.0),
    AttentionCase("lowest number", 20, 19, 8, mask="lowest"),
    AttentionCase("bias", 20, 19, 8, mask="bias"),
    AttentionCase("bias of heads", 20, 19, 8, mask="bias of heads", heads=4, key_heads=2),
    AttentionCase("bias of keys", 20, 19, 8, mask="bias of keys", is_causal=True),
    AttentionCase("bias of a row, two leads", 7, 9, 8, lead=(2, 3), mask="bias of a row"),
    AttentionCase("window", 40, 37, 8, window_size=(5, 2)),
    AttentionCase("window without left end", 30, 40, 8, window_size=(None, 3)),
    AttentionCase("window of the past", 60, 30, 8, window_size=(4, -1), is_causal=True),
    AttentionCase("window under padding", 40, 40, 8, window_size=(6, 6), mask="padding"),
    AttentionCase("causal, lower right", 23, 41, 16, is_causal=True, query_offset=18),
    AttentionCase("causal, lower right, more rows", 41, 23, 16, is_causal=True, query_offset=-18),
    AttentionCase("causal, offset beyond the keys", 20, 19, 8, is_causal=True, query_offset=100),
    AttentionCase("causal, offset before the keys", 20, 19, 8, is_causal=True, query_offset=-100),
    AttentionCase("window, lower right", 30, 70, 8, window_size=(9, 3), query_offset=40),
    AttentionCase("window past the last key", 40, 20, 8, lead=(2, 2), window_size=(6, None), query_offset=5),
    AttentionCase("window before the first key", 45, 30, 8, window_size=(4, 6), query_offset=-17, mask="full"),
    AttentionCase(
        "dropout, lower right", 21, 33, 8, heads=4, key_heads=2, is_causal=True, query_offset=12, dropout_p=0.4
    ),
    AttentionCase("bias, lower right", 20, 29, 8, mask="bias of heads", window_size=(12, 1), query_offset=9),
    AttentionCase("bias of keys, lower right", 31, 19, 8, mask="bias of keys", is_causal=True, query_offset=-12),
    AttentionCase("key length", 20, 39, 8, lead=(2, 2), has_length=True),
    AttentionCase("key start", 20, 39, 8, lead=(3,), heads=4, key_heads=2, has_start=True),
    AttentionCase("key range", 33, 40, 16, lead=(2, 2), heads=1, value_dim=9, has_start=True, has_length=True),
    AttentionCase("key range, no lead", 20, 39, 8, lead=(), has_start=True),
    AttentionCase("key range, lower right", 21, 40, 8, lead=(3,), is_causal=True, query_offset=19, has_start=True),
    AttentionCase("key length, window", 50, 40, 8, window_size=(9, 4), query_offset=-5, has_length=True),
    AttentionCase("key range under a mask", 20, 39, 8, lead=(3,), mask="full", has_start=True, has_length=True),
    AttentionCase("key range and dropout", 20, 39, 8, dropout_p=0.3, has_start=True),
    AttentionCase("key length and bias", 20, 39, 8, mask="bias of heads", has_length=True, dropout_p=0.2),
    AttentionCase("key range and bias of keys", 35, 20, 8, mask="bias of keys", has_start=True),
    AttentionCase("dropout", 30, 35, 8, dropout_p=0.3),
    AttentionCase("dropout, causal grouped heads", 33, 33, 8, heads=4, key_heads=2, is_causal=True, dropout_p=0.5),
    AttentionCase("dropout and bias", 21, 18, 8, value_dim=5, lead=(2, 2), mask="bias of heads", dropout_p=0.2),
    AttentionCase("several panels", 150, 700, 32, lead=(1,), heads=1),
    AttentionCase("several panels, causal", 300, 300, 32, lead=(1,), heads=2, is_causal=True),
    AttentionCase("several panels of a window", 700, 600, 8, lead=(1,), heads=1, window_size=(50, 20)),
    AttentionCase(
        "several panels, lower right",
        300,
        700,
        16,
        lead=(1,),
        heads=2,
        key_heads=1,
        window_size=(150, 0),
        query_offset=400,
    ),
    AttentionCase(
        "several panels, some of nothing", 700, 200, 8, lead=(1,), heads=2, is_causal=True, query_offset=-400
    ),
    AttentionCase(
        "several panels of a key range", 300, 700, 16, lead=(3,), heads=2, key_heads=1, has_start=True, has_length=True
    ),
    AttentionCase("several panels of a bias", 150, 600, 8, lead=(2,), heads=1, mask="bias of heads"),
)


def second_order(function: AttentionFn, inputs: AttentionInputs) -> dict[str, Tensor]:
    """Output, first derivatives and second derivatives of a call, by ``create_graph=True``."""
    primals = [x.detach().requires_grad_() for x in inputs.qkv]
    options, tangents = dict(inputs.options), inputs.tangents
    if inputs.tangent_mask is not None:
        options["attn_mask"] = options["attn_mask"].detach().requires_grad_()
        primals, tangents = [*primals, options["attn_mask"]], (*tangents, inputs.tangent_mask)
    grad_out = inputs.grad_out.detach().requires_grad_()
    with torch.random.fork_rng(devices=[grad_out.device] if grad_out.is_cuda else []):
        torch.manual_seed(SEED)
        out = function(*primals[:3], **options)
    grads = torch.autograd.grad(out, primals, grad_out, create_graph=True)
    seconds = torch.autograd.grad(grads, [*primals, grad_out], tangents)
    results = (out.detach(), *(grad.detach() for grad in grads), *seconds)
    return dict(zip(SECOND_ORDER_OUTPUTS if len(primals) == 3 else MASK_OUTPUTS, results, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; where nothing is expected, the norm of what came. NaN stays NaN."""
    expected = expected.double()
    scale = expected.norm().item()
    return (actual.double() - expected).norm().item() / (scale if scale > 1e-30 else 1.0)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Drawn in float64 and rounded later: every dtype sees the same numbers.
    return torch.randn(shape, generator=generator, dtype=torch.float64)
