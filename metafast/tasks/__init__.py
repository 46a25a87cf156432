"""Tasks from data: a source draws episode n from its seed and n alone, and hands batches to a training."""

from metafast.tasks.dialogue import Dialogue
from metafast.tasks.examples import Examples, Split, split
from metafast.tasks.few_shot import FewShot
from metafast.tasks.mixture import Mixture, size_shares
from metafast.tasks.reading import read_examples
from metafast.tasks.source import Episode, Tasks
from metafast.tasks.transfer import Transfer
from metafast.tasks.translation import Translation

__all__ = [
    "Dialogue",
    "Episode",
    "Examples",
    "FewShot",
    "Mixture",
    "Split",
    "Tasks",
    "Transfer",
    "Translation",
    "read_examples",
    "size_shares",
    "split",
]
