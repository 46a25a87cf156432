"""``torch.rms_norm``, right in forward mode too."""

from metafast.ops.rms_norm.api import rms_norm

__all__ = ["rms_norm"]
