"""Tasks from data: a source draws episode n from its seed and n alone, and hands batches to a training."""

from metafast.tasks.examples import Examples, Split, split
from metafast.tasks.few_shot import FewShot
from metafast.tasks.mixture import Mixture, size_shares
from metafast.tasks.reading import read_examples
from metafast.tasks.source import Episode, Tasks

__all__ = ["Episode", "Examples", "FewShot", "Mixture", "Split", "Tasks", "read_examples", "size_shares", "split"]
