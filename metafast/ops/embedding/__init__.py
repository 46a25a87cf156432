"""``torch.embedding`` with a table of each task's own."""

from metafast.ops.embedding.lookup import embedding

__all__ = ["embedding"]
