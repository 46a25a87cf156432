"""The learners."""

from metafast.compat.learn2learn.algorithms import maml, meta_sgd
from metafast.compat.learn2learn.algorithms.maml import MAML
from metafast.compat.learn2learn.algorithms.meta_sgd import MetaSGD

__all__ = ["MAML", "MetaSGD", "maml", "meta_sgd"]
