"""How many tasks run side by side, and of how many inner steps graphs are kept: ``"auto"`` for both.

The graph of the first inner step is measured at the first call with inputs of a shape. From it follow the memory of all
steps, and a :class:`MemoryChoice` that stays within the learner's budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.engine.autograd_graph import graph_bytes
from metafast.engine.inner_loop import InnerLoop, Start
from metafast.engine.memory_budget import budget_bytes
from metafast.engine.replay_state import ReplayState
from metafast.engine.sharded_parameters import is_sharded
from metafast.engine.task_batch import Params, select_tasks
from metafast.inner import Rule

logger = logging.getLogger("metafast")
# Bytes of adapted parameters from which a task may be large enough for a device by itself. Such tasks are measured before
# they run. Smaller ones all run side by side where memory allows.
LARGE_PARAMETERS = 8 * 2**20
# From here on the graph of one step of one task consists of tensors that are large enough for a device by themselves: more
# tasks side by side take more memory, and no less time.
LARGE_GRAPH = {"cpu": 64 * 2**20, "cuda": 2**30}

# The shapes of a support set without the number of tasks, and its types.
Key = tuple[tuple[torch.Size, torch.dtype], ...]


class MemoryChoice(NamedTuple):
    """The memory plan of a call.

    Attributes:
        tasks_per_chunk: number of tasks that run side by side.
        kept_steps: number of inner steps whose graphs are kept at a time; those of the others are rebuilt.
        graph_bytes: bytes of the graph of one inner step of one task.
        budget_bytes: bytes that graphs may take; None where the free memory is unknown.
    """

    tasks_per_chunk: int
    kept_steps: int
    graph_bytes: int
    budget_bytes: int | None


class PlanChangedError(Exception):
    """The first step of a call has shown that the call has to be made in another way."""


class _Learner(Protocol):
    """The attributes and methods of a meta-learner that its plan uses; :class:`metafast.MetaLearner` documents them."""

    model: nn.Module
    inner: Rule
    steps: int
    order: int
    checkpoint: Any
    tasks_per_chunk: Any
    memory_budget: int | float | None
    capture: bool

    @property
    def device(self) -> torch.device: ...

    def start(self, support: Any) -> Start: ...

    def adapted_wholes(self) -> Params: ...

    def inner_loop(self, start: Start, order: int) -> InnerLoop: ...


@dataclass(frozen=True)
class _Measured:
    """Bytes of one task: of the graph of a step, and of what a rebuilt step keeps instead; the budget.

    ``is_large``: whether the adapted parameters are.
    """

    graph: int
    inputs: int
    is_large: bool
    budget: int | None


class MemoryPlan:
    """The plan of a meta-learner's calls.

    Args:
        learner: the meta-learner.
    """

    def __init__(self, learner: _Learner) -> None:
        self._learner = learner
        self._measured: dict[Key, _Measured] = {}
        # The number of tasks per chunk of the call that is running; None where the plan chooses it.
        self._chunk: int | None = None

    def tasks_per_chunk(self, support: Any, query: Any, tasks: int) -> int:
        """The number of tasks of a call that run side by side."""
        given = self._learner.tasks_per_chunk
        self._chunk = given if given not in ("auto", None) else tasks
        if not self._applies():
            return self._chunk
        if given == "auto" and self._may_run_in_chunks(support, query):
            self._chunk = None
        choice = self.choice(support, tasks)
        # A recording cannot measure, and side by side may be too many already.
        recorded = self._learner.capture and self._learner.checkpoint is not True
        if choice is None and (recorded or (self._chunk is None and tasks > 1 and self._is_large())):
            self._measure_one(support, tasks)
            choice = self.choice(support, tasks)
        return (self._chunk or tasks) if choice is None else choice.tasks_per_chunk

    def kept_steps(self, support: Any, tasks: int) -> int:
        """The number of steps whose graphs are kept, of tasks that run side by side."""
        learner = self._learner
        if learner.checkpoint != "auto":
            return 0 if learner.checkpoint else learner.steps
        choice = self._choose(support, tasks, tasks) if self._applies() else None
        return learner.steps if choice is None else choice.kept_steps

    def choice(self, support: Any, tasks: int) -> MemoryChoice | None:
        """What has been chosen for a call; None where nothing had to be."""
        if not self._applies():
            return None
        return self._choose(support, tasks, self._chunk)

    def has_large_graphs(self, support: Any) -> bool:
        """Whether the graph of a step of one task is known to consist of large tensors."""
        measured = self._measured.get(_key(support))
        return measured is not None and measured.graph >= _large(self._learner.device)

    def after_first_step(self, start: Start, support: Any, tasks: int) -> Callable[[Any], None] | None:
        """What measures the first step of a call from its results; None where nothing is to be measured.

        It raises :class:`PlanChangedError` where the call is to be made in another way.
        """
        if self._learner.capture or self._learner.checkpoint is True:
            return None
        if not self._applies() or self.choice(support, tasks) is not None:
            return None

        def measure(results: Any) -> None:
            self._measure(start, support, tasks, results)
            self._log(support, tasks)
            choice = self.choice(support, tasks)
            if choice is not None and (choice.tasks_per_chunk, choice.kept_steps) != (tasks, self._learner.steps):
                raise PlanChangedError

        return measure

    def _applies(self) -> bool:
        learner = self._learner
        if "auto" not in (learner.checkpoint, learner.tasks_per_chunk) or learner.order == 1 or learner.steps == 0:
            return False
        # Ranks gather sharded parameters together, and may differ in free memory.
        return torch.is_grad_enabled() and not is_sharded(learner.model)

    def _may_run_in_chunks(self, support: Any, query: Any) -> bool:
        if any(leaf.requires_grad for leaf in pytree.tree_leaves((support, query)) if leaf is not None):
            return False
        # Running statistics are updated in the order of the tasks' steps.
        return not any(getattr(module, "track_running_stats", False) for module in self._learner.model.modules())

    def _is_large(self) -> bool:
        return self._own_bytes() >= LARGE_PARAMETERS

    def _own_bytes(self) -> int:
        return sum(p.nbytes for p in self._learner.adapted_wholes().values())

    def _measure_one(self, support: Any, tasks: int) -> None:
        """Takes the first step of one task, and throws it away."""
        learner = self._learner
        with ReplayState(learner.device, learner.model).replayed():
            one = select_tasks(support, slice(0, 1))
            start = learner.start(one)
            results = list(learner.inner_loop(start, order=2).steps(start, one, 1, 1))
            self._measure(start, support, 1, results)
        self._log(support, tasks)

    def _measure(self, start: Start, support: Any, tasks: int, results: Any) -> None:
        learner = self._learner
        known = pytree.tree_leaves((start.params, start.shared, start.own, support))
        own = self._own_bytes()
        inputs = (1 + len(learner.inner.state_names)) * own
        # Later steps hold parameters of each task, where the first has the model's.
        graph = graph_bytes(_tensors(results), _tensors(known)) // tasks + inputs
        budget = budget_bytes(learner.memory_budget, learner.device)
        self._measured[_key(support)] = _Measured(graph, inputs, own >= LARGE_PARAMETERS, budget)

    def _log(self, support: Any, tasks: int) -> None:
        choice = self.choice(support, tasks)
        assert choice is not None
        budget = choice.budget_bytes
        logger.info(
            "the graph of an inner step takes about %.3g MiB per task, %s: %d of %d tasks run side by side, and the last %d "
            "of %d inner steps keep their graphs",
            choice.graph_bytes / 2**20,
            "free memory is unknown" if budget is None else f"graphs may take {budget / 2**20:.4g} MiB",
            choice.tasks_per_chunk,
            tasks,
            choice.kept_steps,
            self._learner.steps,
        )

    def _choose(self, support: Any, tasks: int, chunk: int | None) -> MemoryChoice | None:
        """The choice for a support set of these shapes, in chunks of ``chunk`` tasks where that is given."""
        learner = self._learner
        key = _key(support)
        if key in self._measured:
            return self._choice_by(self._measured[key], tasks, chunk)
        for other, measured in self._measured.items():
            # Smaller ones fit as well.
            if _is_larger(other, key):
                choice = self._choice_by(measured, tasks, chunk)
                if choice.kept_steps == learner.steps and choice.tasks_per_chunk == tasks:
                    return choice
        return None

    def _choice_by(self, measured: _Measured, tasks: int, chunk: int | None) -> MemoryChoice:
        learner = self._learner
        graph, inputs, budget = measured.graph, measured.inputs, measured.budget

        def fits(tasks: int, kept: int) -> bool:
            needed = tasks * (max(kept, 1) * graph + (learner.steps - kept) * inputs)
            return budget is None or needed <= budget

        most = 0 if learner.checkpoint is True else learner.steps
        fewest = learner.steps if learner.checkpoint is False else 0
        number = tasks if chunk is None else min(chunk, tasks)
        if chunk is None:
            enough = min(tasks, -(-_large(learner.device) // max(graph, 1)))
            number = enough if measured.is_large else tasks
            # Tasks that are large enough by themselves lose nothing one after another; rebuilt graphs cost time.
            number = _most(lambda n: fits(n, most), number, enough)
        kept = _most(lambda k: fits(number, k), most, fewest)
        if chunk is None:
            number = _most(lambda n: fits(n, kept), number, 1)
        return MemoryChoice(number, kept, graph, budget)


def _large(device: torch.device) -> int:
    return LARGE_GRAPH.get(device.type, LARGE_GRAPH["cuda"])


def _most(fits: Callable[[int], bool], most: int, fewest: int) -> int:
    """The largest number from ``fewest`` to ``most`` that fits, or ``fewest``."""
    return next((number for number in range(most, fewest, -1) if fits(number)), min(fewest, most))


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(leaves) if isinstance(leaf, Tensor)]


def _key(support: Any) -> Key:
    return tuple((leaf.shape[1:], leaf.dtype) for leaf in _tensors(support))


def _is_larger(key: Key, other: Key) -> bool:
    """Whether each shape is at least as large, of the same types."""
    return len(key) == len(other) and all(
        a_type == b_type and len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True))
        for (a, a_type), (b, b_type) in zip(key, other, strict=True)
    )
