"""Small Transformers for examples, tests and the demo, and a classifier of sentences on any encoder."""

from metafast.models.classifier import Encoder, EncoderClassifier
from metafast.models.sentence import SentenceClassifier

__all__ = ["Encoder", "EncoderClassifier", "SentenceClassifier"]
