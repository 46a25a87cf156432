"""Small Transformers for examples, tests and the demo."""

from metafast.models.classifier import EncoderClassifier

__all__ = ["EncoderClassifier"]
