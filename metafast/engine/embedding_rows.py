"""Embeddings of which the inner loop adapts the rows that are looked up.

A step of SGD, Adam or RMSprop without weight decay leaves a row of an embedding alone whose gradient has always been 0: no
example of the task has looked it up. So a task needs no table of its own, but :class:`Rows`; other rows are the model's.
``embedding_table.py`` has what the model computes with. :class:`Lookups` takes down what the model reads.

Shapes do not depend on the ids: of equal ids the first has the row that is read and adapted, and the others stay behind.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metafast.ops import torch_internals
from metafast.ops.layers.embedding import embedding


class Rows(NamedTuple):
    """The rows of an embedding that tasks have adapted.

    Attributes:
        values: ``[T, R, D]``, or without T for one task.
        ids: ``[T, R]``, their numbers in the table, sorted.
    """

    values: Tensor
    ids: Tensor

    def of(self, weight: Tensor, ids: Tensor) -> Tensor:
        """The rows ``[*, D]`` of one task with the numbers ``ids`` ``[*]``: adapted, or those of ``weight`` ``[V, D]``."""
        return self.over(shared_rows(weight, ids), ids)

    def over(self, others: Tensor, ids: Tensor) -> Tensor:
        """The rows ``[*, D]`` of one task with the numbers ``ids`` ``[*]``: adapted, or those of ``others`` ``[*, D]``."""
        if self.ids.shape[-1] == 0:
            return others
        place, known = self.places(ids)
        return torch.where(known.unsqueeze(-1), embedding(self.values, place), others)

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rows of one task with the numbers ``ids`` ``[*]`` are, and whether they are there."""
        place = torch.searchsorted(self.ids, ids).clamp(max=self.ids.shape[-1] - 1)
        return place, self.ids.gather(0, place.flatten()).view_as(place) == ids

    def tables(self, weight: Tensor) -> Tensor:
        """Every task's table ``[T, V, D]``, without a graph."""
        weight = weight.detach()
        tables = weight.expand(self.ids.shape[0], *weight.shape).clone()
        for table, values, ids in zip(tables, self.values.detach(), self.ids, strict=True):
            table[ids] = Rows(values, ids).of(weight, ids)
        return tables


def shared_rows(weight: Tensor, ids: Tensor) -> Tensor:
    """The rows ``[*, D]`` of a weight ``[V, D]`` that all tasks share with the numbers ``ids`` ``[*]``."""
    sparse = _here.sparse and 2 * ids.numel() < weight.shape[0]
    return torch.ops.aten.embedding(weight, ids, -1, False, sparse)


# Each task's parameters ``[T, *shape]``; of some embeddings Rows, in algorithms that allow them.
TaskParams: TypeAlias = dict[str, Any]


def no_rows(weight: Tensor, tasks: int) -> Rows:
    """The rows of tasks that have adapted none of ``weight`` ``[V, D]``."""
    return Rows(weight.new_empty(tasks, 0, weight.shape[1]), weight.new_empty(tasks, 0, dtype=torch.int64))


class WholeTableError(Exception):
    """The inner loop has to adapt an embedding as a whole.

    Args:
        name: of the embedding's weight.
        reason: why.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is adapted as a whole, since {reason}")
        self.name = name


class _Block(NamedTuple):
    """The rows that one call of ``embedding`` reads.

    Attributes:
        ids: ``[T, n]``, or ``[n]`` of one task; sorted.
        values: the rows, in the graph of the loss.
        dim: dimension T of ``values``; None for one task.
    """

    ids: Tensor
    values: Tensor
    dim: int | None


class Found(NamedTuple):
    """The rows that one call of ``embedding`` reads, for all tasks, and their gradients.

    Attributes:
        rows: ``[T, n, D]`` and ``[T, n]``.
        grads: ``[T, n, D]``.
    """

    rows: Rows
    grads: Tensor


class Lookups:
    """What the model looks up while the losses of all tasks are computed.

    Args:
        growing: whether rows are looked up that the tasks have not adapted yet.
    """

    def __init__(self, growing: bool) -> None:
        self.growing = growing
        # A dict for each task of a loop; one for all tasks under vmap.
        self._blocks: list[dict[str, list[_Block]]] = []
        self._missed: dict[str, list[Tensor]] = {}
        self._finished = False

    def start(self) -> None:
        """The losses are computed from the beginning."""
        self._blocks.clear()
        self._missed.clear()

    def finish(self) -> None:
        """The losses are computed. Parts of the model that are computed again in a backward pass add nothing."""
        self._finished = True

    def next_task(self) -> None:
        """The next lookups are those of the next task, or of all tasks under ``vmap``."""
        self._blocks.append({})

    def add(self, name: str, ids: Tensor, values: Tensor, level: int) -> None:
        """Takes down the rows that a call reads, at the level of the tasks' ``vmap``, or -1 in a loop."""
        if self._finished:
            return
        if level < 0:
            block = _Block(ids, values, None)
        else:
            own_ids, ids_dim = torch_internals.unwrap_batched(ids, level)
            block = _Block(own_ids.movedim(ids_dim or 0, 0), *torch_internals.unwrap_batched(values, level))
        self._blocks[-1].setdefault(name, []).append(block)

    def check(self, name: str, missed: Tensor, level: int) -> None:
        """Takes down whether a call reads rows that are not adapted."""
        if self._finished:
            return
        flags = missed if level < 0 else torch_internals.unwrap_batched(missed, level)[0]
        self._missed.setdefault(name, []).append(flags.detach().any())

    def leaves(self) -> list[Tensor]:
        """All rows that were read, to be differentiated by."""
        return [block.values for task in self._blocks for blocks in task.values() for block in blocks]

    def found(self, grads: Iterable[Tensor | None]) -> dict[str, list[Found]]:
        """What was read of each embedding, with the gradients by :meth:`leaves`.

        Raises:
            WholeTableError: tasks have read different numbers of rows.
        """
        remaining = iter(grads)
        tasks = [
            {name: [(block, next(remaining)) for block in blocks] for name, blocks in task.items()}
            for task in self._blocks
        ]
        found: dict[str, list[Found]] = {}
        for name in {name: None for task in tasks for name in task}:
            shapes = {tuple(block.values.shape for block, _ in task.get(name, [])) for task in tasks}
            if len(shapes) > 1:
                raise WholeTableError(name, "tasks look up different numbers of rows")
            found[name] = [_of_tasks(calls) for calls in zip(*(task[name] for task in tasks), strict=True)]
        return found

    def report(self) -> None:
        """Tells :func:`watching_for_missed` about rows that are not adapted."""
        if _here.missed is not None:
            for name, flags in self._missed.items():
                _here.missed.setdefault(name, []).extend(flags)


def _of_tasks(calls: Sequence[tuple[_Block, Tensor | None]]) -> Found:
    """The same call of all tasks, or of all tasks under ``vmap``."""
    grads = [torch.zeros_like(block.values) if grad is None else grad for block, grad in calls]
    (first, _), *others = calls
    if first.dim is not None:
        assert not others
        return Found(Rows(first.values.movedim(first.dim, 0), first.ids), grads[0].movedim(first.dim, 0))
    blocks = [block for block, _ in calls]
    values, ids = torch.stack([block.values for block in blocks]), torch.stack([block.ids for block in blocks])
    return Found(Rows(values, ids), torch.stack(grads))


class _Here(threading.local):
    lookups: Lookups | None = None
    missed: dict[str, list[Tensor]] | None = None
    sparse: bool = False


_here = _Here()


def current_lookups() -> Lookups | None:
    """The lookups of the losses that this thread computes."""
    return _here.lookups


@contextlib.contextmanager
def looking_up(lookups: Lookups | None) -> Iterator[None]:
    """Inside, what the model looks up is taken down."""
    before, _here.lookups = _here.lookups, lookups
    try:
        yield
    finally:
        _here.lookups = before


def are_sparse_gradients_taken() -> bool:
    """Whether :func:`sparse_gradients` says so."""
    return _here.sparse


@contextlib.contextmanager
def sparse_gradients(taken: bool) -> Iterator[None]:
    """Inside, where ``taken``, a table of which few rows are read gets a sparse gradient: a dense one is as large as it is.

    The table has to be a leaf.
    """
    before, _here.sparse = _here.sparse, taken
    try:
        yield
    finally:
        _here.sparse = before


@contextlib.contextmanager
def repeating_lookups() -> Iterator[None]:
    """Inside, losses are computed once more, and their lookups are those of before."""
    lookups = _here.lookups
    with looking_up(None if lookups is None else Lookups(lookups.growing)):
        yield


@contextlib.contextmanager
def watching_for_missed() -> Iterator[dict[str, list[Tensor]]]:
    """Gives a dict that holds, by name, whether steps have looked up rows that they had to have adapted before."""
    before, _here.missed = _here.missed, {}
    try:
        yield _here.missed
    finally:
        _here.missed = before


def refuse_missed(missed: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises WholeTableError for the first embedding of which rows were missed."""
    for name, flags in missed.items():
        if any(flags):
            raise WholeTableError(name, "the model looks up other rows in later steps on the same support set")


def grown(
    rows: Rows, weight: Tensor, found: Sequence[Found], states: Sequence[Tensor], in_graph: bool
) -> tuple[Rows, Tensor, list[Tensor]]:
    """The rows that are adapted from now on, their gradients, and the rule's state of them.

    Args:
        rows: adapted so far.
        weight: ``[V, D]``, where other rows come from.
        found: what a step has looked up.
        states: ``[T, R, D]`` of ``rows``.
        in_graph: whether what was looked up is in the graph of ``rows`` and ``weight``, and not in one of the step's own.
    """
    if rows.ids.shape[1] == 0 and len(found) == 1 and in_graph:
        return *found[0], []
    ids = torch.cat([rows.ids, *(block.rows.ids for block in found)], dim=1).sort(dim=1).values
    of_tasks = torch.func.vmap(Rows.over)
    others = shared_rows(weight, ids)
    values = of_tasks(rows, others, ids)
    states = [of_tasks(Rows(state, rows.ids), torch.zeros_like(others), ids) for state in states]
    grads = torch.zeros_like(values)
    for block in found:
        place = torch.searchsorted(ids, block.rows.ids).unsqueeze(-1).expand_as(block.grads)
        grads = grads.scatter_add(1, place, block.grads)
    return Rows(values, ids), grads, list(states)
