"""Embeddings of which the inner loop adapts the rows that are looked up.

A step of SGD, Adam or RMSprop without weight decay leaves a row of an embedding alone whose gradient has always been 0: no
example of the task has looked it up. So a task needs no table of its own, but :class:`Rows`; other rows are the model's.
The model computes with a :class:`_Table` in the place of the weight. Only ``torch.nn.functional.embedding`` can read it.
Where a model reads its weight otherwise, :class:`WholeTableError` says so, and the weight is adapted as a whole.

Shapes do not depend on the ids: of equal ids the first has the row that is read and adapted, and the others stay behind.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metafast.inner import SGD, Adam, AdamW, RMSprop, Rule
from metafast.ops import torch_internals
from metafast.ops.layers.embedding import embedding

# Smaller tables are adapted as a whole: nothing would be gained.
LEAST_ROWS = 1024


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
        return self.over(embedding(weight, ids), ids)

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
    others = embedding(weight, ids)
    values = of_tasks(rows, others, ids)
    states = [of_tasks(Rows(state, rows.ids), torch.zeros_like(others), ids) for state in states]
    grads = torch.zeros_like(values)
    for block in found:
        place = torch.searchsorted(ids, block.rows.ids).unsqueeze(-1).expand_as(block.grads)
        grads = grads.scatter_add(1, place, block.grads)
    return Rows(values, ids), grads, list(states)


class _Table(Tensor):
    """What stands in for the weight of an embedding in the model of a task."""

    _name: str
    _weight: Tensor
    _rows: Rows
    _lookups: Lookups | None

    @staticmethod
    def __new__(cls, name: str, weight: Tensor, rows: Rows) -> _Table:
        """Args: name of the weight; the weight ``[V, D]`` of all tasks; the adapted rows of one."""
        table: _Table = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=weight.requires_grad
        )
        table._name, table._weight, table._rows, table._lookups = name, weight, rows, _here.lookups
        return table

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return _looked_up(*args, **kwargs)
        if func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        # Functions that stand in for torch's have a name like theirs.
        raise _read_otherwise(args, kwargs, name if name.startswith("__") else name.removeprefix("_"))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _read_otherwise(args, kwargs or {}, str(func))


# What a table answers: what kind of tensor it is.
_ASKED = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
    *(
        getattr(Tensor, name).__get__
        for name in ("is_cuda", "is_cpu", "is_sparse", "is_meta", "is_leaf", "is_quantized")
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.element_size, Tensor.get_device, Tensor._version.__get__),  # type: ignore[attr-defined]
}


def _read_otherwise(args: Any, kwargs: Any, function: str) -> WholeTableError:
    table = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, _Table))
    return WholeTableError(
        table._name, f"the model reads it by {function}, and not by torch.nn.functional.embedding alone"
    )


def _looked_up(
    input: Tensor,
    table: _Table,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``torch.nn.functional.embedding`` of a table."""
    name, weight, rows, lookups = table._name, table._weight, table._rows, table._lookups
    if max_norm is not None or scale_grad_by_freq:
        raise WholeTableError(name, "max_norm and scale_grad_by_freq look at the whole table")
    # Positions are the same for all tasks, and their rows are not.
    ids = input.flatten().long() + 0 * rows.ids.sum()
    if lookups is None or not torch.is_grad_enabled():
        values = rows.of(weight, ids)
    else:
        values = _taken_down(name, weight, rows, lookups, ids)
    if padding_idx is not None:
        row = padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx
        values = torch.where((ids == row).unsqueeze(-1), values.detach(), values)
    return values.view(*input.shape, weight.shape[1])


def _taken_down(name: str, weight: Tensor, rows: Rows, lookups: Lookups, ids: Tensor) -> Tensor:
    level = torch_internals.level_of(rows.ids)
    if torch_internals.level_of(ids) != level:
        raise WholeTableError(name, "the model looks rows up inside of a transform of its own")
    if not lookups.growing:
        if rows.ids.shape[0] == 0:
            lookups.check(name, torch.ones_like(ids, dtype=torch.bool).any(), level)
            return rows.of(weight, ids)
        place, known = rows.places(ids)
        lookups.check(name, (~known).any(), level)
        return embedding(rows.values, place)
    if rows.ids.shape[0] + ids.shape[0] > weight.shape[0]:
        raise WholeTableError(name, "a support set has more positions than it has rows")
    own = ids.sort().values
    values = rows.of(weight, own)
    lookups.add(name, own, values, level)
    return embedding(values, torch.searchsorted(own, ids))


def with_tables(own: Mapping[str, Tensor | Rows], shared: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors to be placed in a task's model.

    Args:
        own: the task's parameters, or rows of them.
        shared: parameters that are the same for all tasks; those too of which the task has rows.
        prefix: put before all names.
    """
    tensors = dict(shared)
    for name, value in own.items():
        tensors[name] = _Table(name, shared[name], value) if isinstance(value, Rows) else value
    return {prefix + name: tensor for name, tensor in tensors.items()}


def tables_by_rows(model: nn.Module, adapted: Mapping[str, Tensor], rule: Rule) -> frozenset[str]:
    """The parameters of which an inner loop with this rule may adapt rows, by their names among ``adapted``."""
    if not _moves_by_gradient_alone(rule) or any(type(m).__name__ == "OptimizedModule" for m in model.modules()):
        return frozenset()
    tables, others = set[int](), set[int]()
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                fits = key == "weight" and isinstance(module, nn.Embedding) and _fits(module, p)
                (tables if fits else others).add(id(p))
    return frozenset(name for name, p in adapted.items() if id(p) in tables - others)


def _fits(module: nn.Embedding, weight: Tensor) -> bool:
    return (
        not is_traceable_wrapper_subclass(weight)
        and weight.shape[0] >= LEAST_ROWS
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )


def _moves_by_gradient_alone(rule: Rule) -> bool:
    """Whether a parameter stays where it is as long as its gradients are 0."""
    rates = rule.learned
    return (
        type(rule) in (SGD, Adam, AdamW, RMSprop)
        and getattr(rule, "weight_decay", 0.0) == 0
        and "weight_decay" not in rates
        and not any(granularity.startswith("parameter") for granularity in rates.values())
        and (isinstance(rule, SGD) or rule.eps > 0)  # type: ignore[attr-defined]
    )
