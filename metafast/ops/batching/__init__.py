"""Functions of torch whose batching rules are wrong where a forward under ``vmap`` is differentiated afterwards."""

from metafast.ops.batching.functions import FUNCTIONS, METHODS
from metafast.ops.batching.own_memory import OwnMemoryNeededError, views_of_tasks

__all__ = ["FUNCTIONS", "METHODS", "OwnMemoryNeededError", "views_of_tasks"]
