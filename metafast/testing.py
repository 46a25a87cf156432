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


@dataclass(frozen=True)
class AttentionCase:
    """A shape, a mask and a memory order; inputs are drawn fresh from a generator."""

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
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(device, dtype)
        elif mask is not None:
            mask = mask.to(device)
        query, key, value, grad_out = (x.to(device, dtype) for x in (query, key, value, grad_out))
        return AttentionInputs(
            query,
            key,
            value,
            grad_out,
            tuple(x.to(device, dtype) for x in tangents),
            {
                "attn_mask": mask,
                "is_causal": self.is_causal,
                "scale": self.scale,
                "enable_gqa": key_heads != self.heads,
            },
        )

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        shape = {
            None: (),
            "full": (*self.lead, self.heads, self.rows, self.columns),
            "rows": (self.rows, self.columns),
            "padding": (*self.lead, 1, 1, self.columns),
            "additive": (*self.lead, 1, self.rows, self.columns),
            "additive padding": (*self.lead, 1, 1, self.columns),
        }[self.mask]
        if self.mask is None:
            return None
        keep = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.7
        if self.mask == "full":
            keep[..., self.rows // 2, :] = False
        if "padding" in self.mask:
            keep = torch.arange(self.columns).expand(shape) < self.columns - 3
        if self.mask.startswith("additive"):
            return _normal(shape, generator).masked_fill(~keep, -torch.inf)
        return keep


@dataclass(frozen=True)
class AttentionInputs:
    """``function(query, key, value, **options)``, a cotangent of its output and directions for its inputs."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    tangents: tuple[Tensor, ...]
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
        return AttentionInputs(query, key, value, grad_out, tangents, {**self.options, "attn_mask": mask})


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
    AttentionCase("several panels", 150, 700, 32, lead=(1,), heads=1),
    AttentionCase("several panels, causal", 300, 300, 32, lead=(1,), heads=2, is_causal=True),
)


def second_order(function: AttentionFn, inputs: AttentionInputs) -> dict[str, Tensor]:
    """Output, first derivatives and second derivatives of a call, by ``create_graph=True``."""
    qkv = [x.detach().requires_grad_() for x in inputs.qkv]
    grad_out = inputs.grad_out.detach().requires_grad_()
    out = function(*qkv, **inputs.options)
    grads = torch.autograd.grad(out, qkv, grad_out, create_graph=True)
    seconds = torch.autograd.grad(grads, [*qkv, grad_out], inputs.tangents)
    results = (out.detach(), *(grad.detach() for grad in grads), *seconds)
    return dict(zip(SECOND_ORDER_OUTPUTS, results, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; where nothing is expected, the norm of what came. NaN stays NaN."""
    expected = expected.double()
    scale = expected.norm().item()
    return (actual.double() - expected).norm().item() / (scale if scale > 1e-30 else 1.0)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Drawn in float64 and rounded later: every dtype sees the same numbers.
    return torch.randn(shape, generator=generator, dtype=torch.float64)
