"""``torch.embedding`` with a table of each task's own."""

from metafast.ops.embedding.lookup import embedding, embedding_bag

__all__ = ["embedding", "embedding_bag"]
