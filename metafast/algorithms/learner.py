"""The base of every meta-learning algorithm: a model, a loss, an inner loop, and adaptation without a graph."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.computed_once import computing_once
from metafast.engine.adapted_parameters import AdaptedParameters, ParameterSplit, Selection
from metafast.engine.capture import Capture
from metafast.engine.embedding_rows import (
    Rows,
    TaskParams,
    WholeTableError,
    no_rows,
    refuse_missed,
    watching_for_missed,
)
from metafast.engine.embedding_table import tables_by_rows
from metafast.engine.finite import check_finite
from metafast.engine.inference_mode import outside_inference_mode, usable
from metafast.engine.inner_loop import Adapted, InnerLoop, Losses, Start
from metafast.engine.learned_rates import LearnedRates
from metafast.engine.learners import Learners
from metafast.engine.memory_budget import check_budget
from metafast.engine.memory_plan import MemoryPlan
from metafast.engine.reduction import check_reduction
from metafast.engine.replay_state import Buffers
from metafast.engine.sharded_parameters import is_sharded
from metafast.engine.step import Outcome, Step, TaskResults
from metafast.engine.task_batch import (
    LossFn,
    Params,
    check_count,
    check_support_steps,
    count_tasks,
    select_tasks,
    support_at,
)
from metafast.engine.task_model import TaskLosses, TaskModel
from metafast.inner import Rule

logger = logging.getLogger("metafast")


class Options(TypedDict, total=False):
    """Keyword arguments of every algorithm; :class:`MetaLearner` documents them."""

    checkpoint: bool | Literal["auto"]
    task_batching: str
    adapt_parameters: Selection | None
    micro_batches: int
    tasks_per_chunk: int | Literal["auto"] | None
    memory_budget: int | float | None
    reduction: str
    on_nonfinite: str
    capture: bool
    capture_check: int


class MetaLearner(nn.Module):
    """Base of the algorithms. Parameters that do not require a gradient are shared by all tasks and never adapted.

    A new algorithm writes :meth:`task_results`. Where it differs from MAML, it also writes :meth:`start` (where the inner
    loop starts), :meth:`inner_losses` (what the inner loop minimises) and ``__init__``. All options below then work.

    Args:
        model: any module; it runs inside :func:`metafast.accelerate`.
        loss_fn: ``loss_fn(model, batch)`` gives the scalar mean loss of one task, or that and a dict of metrics. It runs
            under ``vmap`` where it can: ``batch`` comes without the task dimension.
        inner: update rule of the inner loop, such as ``metafast.inner.SGD(lr=0.1)``. The rates that its ``learn`` names are
            parameters of this module, in ``rates``, and get their gradients with the model's.
        steps: number of inner steps, K.
        order: 2 for the exact meta-gradient, 1 to take inner gradients as constants. May be set later.
        checkpoint: for ``order=2``. False keeps the graphs of all inner steps. True rebuilds each inner step's graph in the
            backward pass: the memory of one step for about a third more arithmetic, and the same gradient. ``"auto"`` keeps
            as many as fit into ``memory_budget``; all of a model that ``fully_shard`` has sharded.
        task_batching: ``"vmap"``, ``"loop"`` (one task after another) or ``"auto"``: vmap unless the model does not run
            under vmap, has backward hooks, or keeps something of each call that a loop over tasks would leave
            otherwise; the reason is logged. Where the model's outputs depend on its earlier calls (a counter, a carried
            state), ``tasks_per_chunk`` becomes 1, so that calls come in the order of a plain loop. Running statistics of
            batch norm are updated step by step over all tasks of a chunk; ``tasks_per_chunk=1`` updates them task by task.
        adapt_parameters: the parameters that the inner loop adapts: name patterns such as ``"head.*"``, or
            ``predicate(name, parameter)``; None: all. They are chosen now; a parameter that is frozen later is adapted no
            longer. The others are neither copied per task nor differentiated in the inner loop, and still get their exact
            meta-gradient. A tied parameter matches by any of its names.
        micro_batches: number of parts into which an inner step cuts its support sets (the second dimension of every tensor).
            The gradients of the parts are accumulated. With ``checkpoint``, the memory of a step is that of one part. The
            gradient is the same for a ``loss_fn`` that is a mean over examples.
        tasks_per_chunk: number of tasks that run side by side; None: all. Chunks run one after another in the memory of one.
            The gradient is then computed in the forward call already, and ``backward()`` hands it on. ``"auto"``: all, but
            fewer where tensors of a task are so large that tasks side by side are no faster, or where ``memory_budget``
            asks for it; for ``order=2``.
        memory_budget: for ``"auto"``: the bytes that the graphs of inner steps may take (an int), or their fraction of the
            memory that is free at the first call with such shapes (a float). None: half of it. The log says once what was
            chosen, ``outcome.memory`` at every call.
        reduction: how the tasks' losses, weighted by ``task_weights``, become one: ``"mean"``, ``"sum"``, or
            ``"global_mean"`` for ``DistributedDataParallel``: the mean over the tasks of all ranks, which may have different
            numbers of tasks.
        on_nonfinite: ``"raise"``, or ``"skip"``: a task with a loss that is not finite is logged and left out, and the
            call is repeated on the others. A task whose meta-gradient alone is not finite is not noticed.
        capture: record the whole step, inner loop and meta-gradient, at the first call with given shapes, and replay it at
            the next calls, without Python, autograd and allocation between the kernels. The gradient is then computed in the
            forward call already. On CUDA a replay is one CUDA graph. ``model`` and ``loss_fn`` must do the same each time:
            their Python runs once. A look at the values of tensors is refused, and so is dropout with ``checkpoint``. A
            gradient of the gradient is not available. Recording takes seconds. The programs of the last few kinds of call
            are kept, each with its memory.
        capture_check: number of replays that are compared with the uncaptured call, to find what a recording missed: the
            first ones with other numbers than the recorded ones. The second and later comparisons are left out where they
            would take more than a third of the time that recording took. 0: none.

    Attributes:
        outcome: the :class:`metafast.Outcome` of the latest call.
        rates: the learned rates, without parameters where there are none.
        task_losses: ``task_losses.compute(params, shared, batch)`` gives the losses ``[T]`` and the metrics of a batch, at
            parameters ``params`` ``[T, *shape]``, one per task, and ``shared`` ``[*shape]``, the same for all tasks.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        FloatingPointError: from a call, when a loss is not finite; the message names task and step.
    """

    # A loss may hold its learner, whose attributes are no state of the model.
    is_meta_learner = True
    adapts_rows: ClassVar[bool] = False
    """Whether the algorithm takes ``Rows`` in the place of adapted embeddings (:mod:`metafast.engine.embedding_rows`)."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        inner: Rule,
        steps: int,
        order: int = 2,
        checkpoint: bool | Literal["auto"] = "auto",
        task_batching: str = "auto",
        adapt_parameters: Selection | None = None,
        micro_batches: int = 1,
        tasks_per_chunk: int | Literal["auto"] | None = "auto",
        memory_budget: int | float | None = None,
        reduction: str = "mean",
        on_nonfinite: str = "raise",
        capture: bool = False,
        capture_check: int = 2,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a callable loss_fn(model, batch), got {type(loss_fn).__name__}")
        if not isinstance(inner, Rule):
            raise TypeError(f"inner: expected a rule of metafast.inner, got {type(inner).__name__}")
        if not isinstance(checkpoint, bool) and checkpoint != "auto":
            raise ValueError(f"checkpoint: expected True, False or 'auto', got {checkpoint!r}")
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite: expected 'raise' or 'skip', got {on_nonfinite!r}")
        if not isinstance(capture, bool):
            raise TypeError(f"capture: expected True or False, got {type(capture).__name__}")
        check_reduction(reduction)
        self.model = model
        self.loss_fn = loss_fn
        self.inner = inner
        self.steps = check_count("steps", steps)
        self.order = order
        self.checkpoint: bool | Literal["auto"] = checkpoint
        self.micro_batches = check_count("micro_batches", micro_batches, minimum=1)
        if tasks_per_chunk is not None and tasks_per_chunk != "auto":
            check_count("tasks_per_chunk", tasks_per_chunk, minimum=1)
        self.tasks_per_chunk: int | Literal["auto"] | None = tasks_per_chunk
        self.memory_budget = check_budget(memory_budget)
        self.reduction = reduction
        self.on_nonfinite = on_nonfinite
        self.capture = capture
        self.capture_check = check_count("capture_check", capture_check)
        self.outcome: Outcome | None = None
        self._adapted = AdaptedParameters(model, adapt_parameters)
        self.rates = LearnedRates(inner, self._rated(self._adapted.split(model).adapted), steps)
        self._use_task_model(model, task_batching)
        self._step = Step(self, Capture(self, ("model", "loss_fn")))
        self.memory_plan = MemoryPlan(self)
        # Names of embeddings that are adapted as a whole. Programs depend on it.
        self._whole_tables: tuple[str, ...] = ()

    @property
    def order(self) -> int:
        """2 for the exact meta-gradient, 1 to take inner gradients as constants."""
        return self._order

    @order.setter
    def order(self, order: int) -> None:
        if order not in (1, 2):
            raise ValueError(f"order: expected 1 or 2, got {order!r}")
        self._order = order

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.model.parameters()).device

    def forward(self, support: Any, query: Any, task_weights: Tensor | None = None) -> Tensor:
        """The query loss after adaptation, over tasks; its ``backward()`` leaves the algorithm's meta-gradient.

        ``outcome`` holds the losses per step and task, the metrics and the tasks left out afterwards.

        Args:
            support: pytree of tensors whose first dimension is the task, or a :class:`metafast.PerStep` of at least as many
                of these as there are inner steps.
            query: pytree of tensors with as many tasks as ``support``.
            task_weights: ``[T]``, weights of the tasks' losses in their mean or sum; at least 0, without a gradient.
        """
        with outside_inference_mode():
            return self._step.loss(usable(support), usable(query), task_weights)

    def adapt(self, support: Any, steps: int | None = None) -> Learners:
        """Every task's adapted model, without a graph.

        Buffers of the model, such as running statistics, stay as they are.

        Args:
            support: as in a call.
            steps: number of inner steps; None: as many as in training; 0: unadapted.
        """
        with outside_inference_mode(), torch.no_grad():
            return self._adapt(usable(support), self.steps if steps is None else check_count("steps", steps))

    def _adapt(self, support: Any, steps: int) -> Learners:
        tasks = count_tasks(support, "support")
        check_support_steps(support, steps)

        def adapted(support: Any) -> tuple[Adapted, dict[str, list[Tensor]]]:
            with self.computing_once(support), watching_for_missed() as missed:
                start = self.start(support)
                loop = self.inner_loop(start, order=1)
                return loop.run(start, support, count_tasks(support, "support"), steps), missed

        def in_chunks() -> Adapted:
            # No graph is kept, so that all of them may run side by side.
            size = self.tasks_per_chunk if isinstance(self.tasks_per_chunk, int) else tasks
            found = []
            for first in range(0, tasks, size):
                chunk = select_tasks(support, slice(first, first + size))
                with Buffers(self.model).scratch():
                    of_chunk, missed = self._step.replay_or_compute(
                        f"adapt {steps}", adapted, chunk, update_buffers=False
                    )
                    refuse_missed(missed)
                    found.append(of_chunk)
            return found[0] if len(found) == 1 else Adapted.joined(found)

        whole = self._step.whole_parameters()
        if whole is None:
            params, losses = self._step.in_order(in_chunks)
            # The shared parameters themselves, of which a replay would give copies.
            shared = self._names_for_tasks(self.split_parameters().shared)
        else:
            with whole.placed(), whole.gathered():
                params, losses = whole.own(self._step.in_order(in_chunks))
            # Of a sharded model they are gathered when the learners compute.
            shared = {}
        check_finite(losses, None)
        # Rows that a task has not adapted stay what they are now.
        tables = {
            name: p.clone()
            for name, p in self._names_for_tasks(self.split_parameters().adapted).items()
            if isinstance(params[name], Rows)
        }
        return Learners(
            self._task_model,
            pytree.tree_map(torch.detach, params),
            {name: p.detach() for name, p in {**shared, **tables}.items()},
            sharded=None if whole is None else self,
        )

    @abstractmethod
    def task_results(self, support: Any, query: Any, tasks: int) -> TaskResults:
        """The algorithm itself: losses of some tasks, whose gradient is the meta-gradient.

        Args:
            support: as in a call, checked already; perhaps of fewer tasks than the call has.
            query: likewise; None where the algorithm's ``forward`` allows it.
            tasks: number of tasks T.
        """

    def start(self, support: Any) -> Start:
        """The start of the inner loop: by default the model's parameters, for all tasks."""
        adapted, shared = self.split_parameters()
        self.rates.check_names(self._rated(adapted))
        tables = self._tables(adapted)
        shared = {**shared, **{name: adapted[name] for name in adapted if name in tables}}
        return Start(params=adapted, shared=shared, rates=self.rates, tables=tables)

    def inner_losses(self, start: Start) -> Losses:
        """The losses that the inner loop minimises: by default ``loss_fn`` on the support set."""
        return self.task_losses

    def inner_loop(self, start: Start, order: int) -> InnerLoop:
        """The inner loop with this learner's rule: ``inner_loop(start, order).run(start, support, tasks, steps)``."""
        return InnerLoop(self.inner_losses(start), self.inner, order, micro_batches=self.micro_batches)

    def training_loop(self, start: Start, support: Any, tasks: int) -> InnerLoop:
        """The inner loop of a call: with the learner's order, and with graphs kept or rebuilt as ``checkpoint`` says."""
        return dataclasses.replace(
            self.inner_loop(start, self.order),
            rebuilt_steps=self.steps - self.memory_plan.kept_steps(support, tasks),
            after_first_step=self.memory_plan.after_first_step(start, support, tasks),
            is_large=not self.capture and self.memory_plan.has_large_graphs(support),
        )

    def split_parameters(self) -> ParameterSplit:
        """The model's parameters by name: those that the inner loop adapts, and those that tasks share."""
        return self._adapted.split(self.model)

    def trained_parameters(self) -> Params:
        """The parameters of this learner that get a meta-gradient."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def first_forward(self, support: Any) -> frozenset[str]:
        """Runs the tasks' losses once, before a first recording. Returns the attributes that calls leave the same."""
        start = self.start(support)
        tasks = count_tasks(support, "support")
        # Finds out, too, whether the model reads its embeddings otherwise than row by row.
        tables = {name: no_rows(start.params[name], tasks) for name in start.tables}
        params: TaskParams = {**InnerLoop.unadapted(start, tasks), **tables}
        self.task_losses.compute(params, start.shared, support_at(support, 0))
        return self.task_losses.settled

    def adapt_whole(self, error: WholeTableError) -> None:
        """From now on the inner loop adapts this embedding as a whole."""
        assert error.name not in self._whole_tables
        logger.info("%s", error)
        self._whole_tables = (*self._whole_tables, error.name)

    def tables(self) -> list[Tensor]:
        """The weights of the embeddings of which the inner loop adapts the rows that are looked up."""
        adapted = self.split_parameters().adapted
        return [adapted[name] for name in self._tables(adapted)]

    def adapted_wholes(self) -> Params:
        """The parameters of which each task has its own, by name; of an embedding in :meth:`tables` it has few rows."""
        adapted = self.split_parameters().adapted
        tables = self._tables(adapted)
        return {name: p for name, p in adapted.items() if name not in tables}

    def _tables(self, adapted: Params) -> frozenset[str]:
        """The embeddings of which the inner loop adapts the rows that are looked up."""
        # Parts of a support set look up rows of their own; a sharded table is gathered as a whole.
        if not self.adapts_rows or self.micro_batches > 1 or is_sharded(self.model):
            return frozenset()
        names = tables_by_rows(self.model, adapted, self.inner)
        return frozenset(
            name for name in names if not set(self._whole_tables) & self._names_for_tasks({name: adapted[name]}).keys()
        )

    @contextlib.contextmanager
    def computing_once(self, *batches: Any) -> Iterator[None]:
        """Inside, what depends on these batches and on no adapted parameter is computed once, for all inner steps."""
        adapted = {id(p) for p in self.split_parameters().adapted.values()}
        others = [p for p in self.model.parameters() if id(p) not in adapted]
        # Rebuilt steps have a graph each.
        if (
            not others
            or self.steps < 2
            or self.memory_plan.kept_steps(batches[0], count_tasks(batches[0], "support")) < self.steps
        ):
            yield
            return
        leaves = [leaf for leaf in pytree.tree_leaves(batches) if leaf is not None]
        with computing_once(self.model, [*leaves, *others, *self.model.buffers()]):
            yield

    def _use_task_model(self, model: nn.Module, task_batching: str) -> None:
        """Chooses the model that tasks compute with: the learner's, or one that contains it."""
        # Not submodules of this one: they hold the model again, under other names.
        self.task_losses = TaskLosses(model, self.loss_fn, task_batching)
        self._task_model = TaskModel(model, task_batching, in_steps=False)

    def _rated(self, adapted: Params) -> Params:
        """The parameters that have learned rates, given the adapted ones."""
        return adapted

    def _names_for_tasks(self, params: Params) -> Params:
        """Parameters of the learner's model by their names in the model that tasks compute with."""
        return params
