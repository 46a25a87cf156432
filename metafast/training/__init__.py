"""One training loop and one evaluation for every algorithm: ``fit`` and ``evaluate``."""

from metafast.training.checkpoint import read_checkpoint
from metafast.training.evaluation import Evaluation, Interval, evaluate
from metafast.training.loop import Fit, Validation, fit
from metafast.training.losses import classification_loss, language_model_loss, translation_loss

__all__ = [
    "Evaluation",
    "Fit",
    "Interval",
    "Validation",
    "classification_loss",
    "evaluate",
    "fit",
    "language_model_loss",
    "read_checkpoint",
    "translation_loss",
]
