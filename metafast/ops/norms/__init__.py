"""``torch.batch_norm``, ``torch.instance_norm`` and ``torch.group_norm``, right in forward mode too."""

from metafast.ops.norms.api import batch_norm, group_norm, instance_norm

__all__ = ["batch_norm", "group_norm", "instance_norm"]
