"""Scaled dot-product attention, differentiable twice."""

from metafast.ops.attention.api import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
