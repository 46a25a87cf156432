"""What every source of tasks shares: episode n is drawn from the seed and n alone, and batches come from a DataLoader."""

from __future__ import annotations

import hashlib
import itertools
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from metafast.arguments import check_positive

__all__ = ["Episode", "Tasks", "generator_of", "in_turn", "padding_id"]


class Episode(NamedTuple):
    """One task: pytrees of tensors whose first dimension is the example."""

    support: Any
    query: Any


def generator_of(seed: int, number: int) -> torch.Generator:
    """The random numbers of one episode, which depend on the seed and the episode's number alone."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def padding_id(tokenizer: Any) -> int:
    """The id that a tokenizer of Hugging Face pads with; 0 of bytes (None), and of one that does not say."""
    return getattr(tokenizer, "pad_token_id", None) or 0


def in_turn(names: Sequence[str], seed: int, number: int) -> str:
    """The name of an episode's task, where tasks take turns: every round has each name once, in random order."""
    round_, place = divmod(number, len(names))
    return names[int(torch.randperm(len(names), generator=generator_of(seed, -1 - round_))[place])]


class Tasks(Dataset[Episode], ABC):
    """A stream of tasks. A source writes :meth:`__getitem__`, which draws one episode from its number.

    Any worker can draw any episode, so that the stream is the same whatever their number, and it is resumed by starting at
    a later number.

    Args:
        seed: seed of all episodes.
        multiple: sequences of a batch are padded to the longest of them, rounded up to a multiple of this. A captured step
            is recorded anew for every length: a larger multiple means fewer lengths.

    Attributes:
        padding: the padding value of a leaf by its name in the batch; 0 for others.
    """

    def __init__(self, seed: int = 0, multiple: int = 1) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        self.seed = seed
        self.multiple = check_positive("multiple", multiple)
        self.padding: Mapping[str, int] = {}

    @abstractmethod
    def __getitem__(self, number: int) -> Episode:
        """Episode ``number``, counted from 0, drawn from ``generator_of(self.seed, number)``."""

    def collate(self, episodes: Sequence[Episode]) -> tuple[Any, Any]:
        """Support and query of a batch of tasks: leaves ``[tasks, examples, …]``, padded to what this batch needs.

        Raises:
            ValueError: the tasks have different leaves or numbers of examples.
        """
        support, query = (self._stacked([episode[part] for episode in episodes], part) for part in (0, 1))
        return support, query

    def _stacked(self, batches: Sequence[Any], part: int) -> Any:
        flat = [pytree.tree_flatten_with_path(batch) for batch in batches]
        if any(spec != flat[0][1] for _, spec in flat):
            raise ValueError(
                "tasks: expected tasks of the same structure in a batch, got several; draw a batch from one family"
            )
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        stacked = [
            _padded([leaf for _, leaf in column], self._padding_of(column[0][0]), self.multiple, Episode._fields[part])
            for column in columns
        ]
        return pytree.tree_unflatten(stacked, flat[0][1])

    def _padding_of(self, path: tuple[Any, ...]) -> int:
        return self.padding.get(str(getattr(path[-1], "key", "")), 0) if path else 0

    def batches(
        self, tasks: int, *, start: int = 0, stop: int | None = None, workers: int = 0
    ) -> Iterator[tuple[Any, Any]]:
        """Batches of consecutive episodes, drawn ahead by a ``torch.utils.data.DataLoader``.

        Args:
            tasks: episodes per batch; the last batch before ``stop`` may have fewer.
            start: number of the first episode: 0, or where an earlier stream was left.
            stop: number of the episode to end before; None: never.
            workers: processes that draw ahead; 0 draws here. Batches do not depend on it.

        Returns:
            pairs ``(support, query)`` with the task as first dimension.

        Raises:
            ValueError: a number is out of range.
        """
        check_positive("tasks", tasks)
        if start < 0 or (stop is not None and stop < start) or workers < 0:
            raise ValueError(
                f"start, stop, workers: expected 0 <= start <= stop and workers >= 0, got {start}, {stop} and {workers}"
            )
        numbers = itertools.count(start) if stop is None else range(start, stop)
        loader = DataLoader(
            self,
            batch_size=tasks,
            sampler=numbers,
            collate_fn=self.collate,
            num_workers=workers,
            worker_init_fn=_leave_interrupts_alone,
            # The loader draws a seed for its workers, which would otherwise come from the global generator.
            generator=torch.Generator().manual_seed(0),
        )
        return iter(loader)


def _leave_interrupts_alone(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the one that trains decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _padded(leaves: Sequence[Tensor], value: int, multiple: int, part: str) -> Tensor:
    """``leaves`` stacked, padded at the end of every dimension but the first."""
    shapes = [leaf.shape for leaf in leaves]
    if any(len(shape) != len(shapes[0]) or shape[:1] != shapes[0][:1] for shape in shapes):
        raise ValueError(
            f"{part}: expected as many examples in every task of a batch, got {sorted({tuple(shape) for shape in shapes})}"
        )
    sizes = [max(sizes) for sizes in zip(*(shape[1:] for shape in shapes), strict=True)]
    if leaves[0].dim() == 2:
        sizes = [-(-size // multiple) * multiple for size in sizes]
    return torch.stack([_grown(leaf, sizes, value) for leaf in leaves])


def _grown(leaf: Tensor, sizes: Sequence[int], value: int) -> Tensor:
    missing = [size - have for size, have in zip(sizes, leaf.shape[1:], strict=True)]
    if not any(missing):
        return leaf
    return F.pad(leaf, [part for amount in reversed(missing) for part in (0, amount)], value=value)
