"""Small Transformers for examples, tests and the demo: encoder, decoder, encoder–decoder, and classifiers on encoders."""

from metafast.models.classifier import Encoder, EncoderClassifier
from metafast.models.decoder import Decoder
from metafast.models.encoder_decoder import EncoderDecoder
from metafast.models.sentence import SentenceClassifier

__all__ = ["Decoder", "Encoder", "EncoderClassifier", "EncoderDecoder", "SentenceClassifier"]
