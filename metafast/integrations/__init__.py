"""Other libraries' models on this library's attention."""

from metafast.integrations import huggingface

__all__ = ["huggingface"]
