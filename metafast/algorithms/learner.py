"""What every meta-learning algorithm has: a model, a loss, an inner loop, and adaptation without a graph."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.computed_once import computing_once
from metafast.engine.adapted_parameters import AdaptedParameters, ParameterSplit, Selection
from metafast.engine.capture import Capture
from metafast.engine.finite import check_finite
from metafast.engine.inference_mode import outside_inference_mode, usable
from metafast.engine.inner_loop import Adapted, InnerLoop, Losses, Start
from metafast.engine.learned_rates import LearnedRates
from metafast.engine.learners import Learners
from metafast.engine.memory_budget import graphs_fit
from metafast.engine.reduction import check_reduction
from metafast.engine.replay_state import Buffers, ReplayState
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


class Options(TypedDict, total=False):
    """Keyword arguments of every algorithm; :class:`MetaLearner` documents them."""

    checkpoint: bool | Literal["auto"]
    task_batching: str
    adapt_parameters: Selection | None
    micro_batches: int
    tasks_per_chunk: int | None
    reduction: str
    on_nonfinite: str
    capture: bool
    capture_check: int


class MetaLearner(nn.Module):
    """Base of the algorithms. Parameters that do not require a gradient are shared by all tasks and never adapted.

    A new algorithm writes :meth:`task_results`, and, where it differs from MAML in them, :meth:`start` (where the inner
    loop starts), :meth:`inner_losses` (what the inner loop minimises) and ``__init__``. All options below then work.

    Args:
        model: any module; it runs inside :func:`metafast.accelerate`.
        loss_fn: ``loss_fn(model, batch)`` gives the scalar mean loss of one task, or that and a dict of metrics. It runs
            under ``vmap`` where it can: ``batch`` comes without the task dimension.
        inner: update rule of the inner loop, such as ``metafast.inner.SGD(lr=0.1)``. The rates that it is told to learn
            are parameters of this module, in ``rates``, and get their gradients with the model's.
        steps: inner steps K.
        order: 2 for the exact meta-gradient, 1 to take inner gradients as constants. May be set later.
        checkpoint: for ``order=2``, rebuild each inner step's graph in the backward pass instead of keeping all: the
            memory of one step for about a third more arithmetic; the same gradient. ``"auto"`` rebuilds where kept graphs
            would take more than half of the free memory, and logs what it found.
        task_batching: ``"vmap"``, ``"loop"`` (one task after another) or ``"auto"``: vmap unless the model does not run
            under it, has backward hooks, or keeps something of each call that vmap would leave otherwise than a loop over
            tasks does; the reason is logged. Where the model's outputs depend on what its calls before left (a counter, a
            carried state), ``tasks_per_chunk`` becomes 1, so that calls come in the order of a plain loop.
        adapt_parameters: which parameters the inner loop adapts: name patterns such as ``"head.*"``, or
            ``predicate(name, parameter)``; None: all. They are chosen now; what is frozen later is adapted no longer. The
            others are neither copied for the tasks nor differentiated in the inner loop, and still get their exact
            meta-gradient. A tied parameter matches by any of its names.
        micro_batches: into how many parts an inner step cuts its support sets (the second dimension of every tensor),
            whose gradients it accumulates. With ``checkpoint``, the memory of a step is that of one part. The same
            gradient for a ``loss_fn`` that is a mean over examples.
        tasks_per_chunk: how many tasks run side by side. With fewer than a call has, chunks run one after another in the
            memory of one; the gradient is then computed in the call already, and ``backward()`` hands it on.
        reduction: of the tasks' losses, weighted by ``task_weights``: ``"mean"``, ``"sum"``, or ``"global_mean"`` for
            ``DistributedDataParallel``: the mean over the tasks of all ranks, which may have different numbers of them.
        on_nonfinite: ``"raise"``, or ``"skip"``: a task with a loss that is not finite is logged and left out, and the
            call is repeated on the others. (One that is not finite in the meta-gradient alone is not noticed.)
        capture: record the whole step (inner loop and meta-gradient, which the call then computes already) at the first call
            with given shapes, and replay it at the next ones: the same numbers without Python, autograd and allocation
            between the kernels, which is much of the time where tensors are small. On CUDA a replay is one CUDA
            graph. ``model`` and ``loss_fn`` must do the same each time: what they compute in Python is computed once. A
            look at the values of tensors is refused, and so is dropout with ``checkpoint``. A gradient of the gradient is
            not available. Recording takes seconds; programs for the last few kinds of call are kept, each with its memory.
        capture_check: how many replays of a program, the first with other numbers than were recorded, are compared with the
            uncaptured call, which finds what a recording missed. The second and later ones are left out where comparing
            would take more than a third of what recording took. 0: none.

    Attributes:
        outcome: the :class:`metafast.Outcome` of the latest call.
        rates: the learned rates, without parameters where there are none.
        task_losses: ``task_losses.compute(params, shared, batch)`` gives the losses ``[T]`` and metrics of a batch, at
            parameters ``[T, *shape]`` of each task and ``[*shape]`` of all.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        FloatingPointError: from a call, when a loss is not finite; the message names task and step.
    """

    # A loss may hold its learner, whose attributes are no state of the model.
    is_meta_learner = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        inner: Rule,
        steps: int,
        order: int = 1,
        checkpoint: bool | Literal["auto"] = False,
        task_batching: str = "auto",
        adapt_parameters: Selection | None = None,
        micro_batches: int = 1,
        tasks_per_chunk: int | None = None,
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
        self.tasks_per_chunk = (
            None if tasks_per_chunk is None else check_count("tasks_per_chunk", tasks_per_chunk, minimum=1)
        )
        self.reduction = reduction
        self.on_nonfinite = on_nonfinite
        self.capture = capture
        self.capture_check = check_count("capture_check", capture_check)
        self.outcome: Outcome | None = None
        self._adapted = AdaptedParameters(model, adapt_parameters)
        self.rates = LearnedRates(inner, self._rated(self._adapted.split(model).adapted), steps)
        self._use_task_model(model, task_batching)
        self._step = Step(self, Capture(self, ("model", "loss_fn")))
        self._graphs_fit: dict[Any, bool] = {}

    @property
    def order(self) -> int:
        """1 or 2."""
        return self._order

    @order.setter
    def order(self, order: int) -> None:
        if order not in (1, 2):
            raise ValueError(f"order: expected 1 or 2, got {order!r}")
        self._order = order

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    def forward(self, support: Any, query: Any, task_weights: Tensor | None = None) -> Tensor:
        """The query loss after adaptation, over tasks; its ``backward()`` leaves the algorithm's meta-gradient.

        What the call saw (losses per step and task, metrics, tasks left out) is in ``outcome`` afterwards.

        Args:
            support, query: pytrees of tensors whose first dimension is the task, the same number of tasks in both.
                ``support`` may be a :class:`metafast.PerStep` of as many batches as there are inner steps.
            task_weights: ``[T]``, of the tasks' losses in their mean or sum; at least 0, without a gradient.
        """
        with outside_inference_mode():
            return self._step.loss(usable(support), usable(query), task_weights)

    def adapt(self, support: Any, steps: int | None = None) -> Learners:
        """Every task's model after ``steps`` inner steps (None: as many as in training; 0: unadapted), without a graph.

        Buffers of the model, such as running statistics, stay as they are.

        Args:
            support: as in a call.
        """
        with outside_inference_mode(), torch.no_grad():
            return self._adapt(usable(support), self.steps if steps is None else check_count("steps", steps))

    def _adapt(self, support: Any, steps: int) -> Learners:
        tasks = count_tasks(support, "support")
        check_support_steps(support, steps)

        def adapted(support: Any) -> Adapted:
            with self.computing_once(support):
                start = self.start(support)
                return self.inner_loop(start, order=1).run(start, support, count_tasks(support, "support"), steps)

        def in_chunks() -> Adapted:
            size = self.tasks_per_chunk or tasks
            found = []
            for first in range(0, tasks, size):
                chunk = select_tasks(support, slice(first, first + size))
                with Buffers(self.model).scratch():
                    found.append(self._step.replay_or_compute(f"adapt {steps}", adapted, chunk, update_buffers=False))
            return found[0] if len(found) == 1 else Adapted.joined(found)

        params, losses = self._step.in_order(in_chunks)
        check_finite(losses, None)
        # The shared parameters themselves, of which a replay would give copies.
        shared = self._names_for_tasks(self.split_parameters().shared)
        return Learners(
            self._task_model,
            {name: p.detach() for name, p in params.items()},
            {name: p.detach() for name, p in shared.items()},
        )

    @abstractmethod
    def task_results(self, support: Any, query: Any, tasks: int) -> TaskResults:
        """What the algorithm computes for some tasks; the gradient of ``losses`` is its meta-gradient.

        Args:
            support, query: as in a call; checked, and perhaps fewer tasks than the call has. ``query`` may be None where the
                algorithm's ``forward`` allows it.
            tasks: their number T.
        """

    def start(self, support: Any) -> Start:
        """Where the inner loop starts: by default at the model's parameters, for all tasks."""
        adapted, shared = self.split_parameters()
        self.rates.check_names(self._rated(adapted))
        return Start(params=adapted, shared=shared, rates=self.rates)

    def inner_losses(self, start: Start) -> Losses:
        """What the inner loop minimises: by default ``loss_fn`` on the support set."""
        return self.task_losses

    def inner_loop(self, start: Start, order: int, checkpoint: bool = False) -> InnerLoop:
        """The inner loop with this learner's rule: ``inner_loop(start, order).run(start, support, tasks, steps)``."""
        return InnerLoop(self.inner_losses(start), self.inner, order, checkpoint, self.micro_batches)

    def training_loop(self, start: Start, support: Any, tasks: int) -> InnerLoop:
        """The inner loop of a call: of the learner's order, with graphs kept or rebuilt as ``checkpoint`` says."""
        return self.inner_loop(start, self.order, self._rebuilds(start, support, tasks))

    def split_parameters(self) -> ParameterSplit:
        """The model's parameters by name: those that the inner loop adapts, and those that tasks share."""
        return self._adapted.split(self.model)

    def trained_parameters(self) -> Params:
        """The parameters of this learner that get a meta-gradient."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def first_forward(self, support: Any) -> frozenset[str]:
        """Runs the tasks' losses once, before a first recording. Returns the attributes that calls leave the same."""
        start = self.start(support)
        params = InnerLoop.unadapted(start, count_tasks(support, "support"))
        self.task_losses.compute(params, start.shared, support_at(support, 0))
        return self.task_losses.settled

    @contextlib.contextmanager
    def computing_once(self, *batches: Any) -> Iterator[None]:
        """Inside, what depends on these batches and on no adapted parameter is computed once, for all inner steps."""
        adapted = {id(p) for p in self.split_parameters().adapted.values()}
        others = [p for p in self.model.parameters() if id(p) not in adapted]
        # Rebuilt steps have a graph each.
        if not others or self.steps < 2 or self.checkpoint is not False:
            yield
            return
        leaves = [leaf for leaf in pytree.tree_leaves(batches) if leaf is not None]
        with computing_once(self.model, [*leaves, *others, *self.model.buffers()]):
            yield

    def choose_memory(self, support: Any, tasks: int) -> None:
        """Decides ``checkpoint="auto"`` for batches of these shapes."""
        if self.checkpoint == "auto":
            # A start may run the model.
            with ReplayState(self.device, self.model).replayed():
                self._rebuilds(self.start(support), support, tasks)

    def _rebuilds(self, start: Start, support: Any, tasks: int) -> bool:
        if self.checkpoint != "auto":
            return self.checkpoint
        return self.order == 2 and torch.is_grad_enabled() and not self._keeping_graphs_fits(start, support, tasks)

    def _keeping_graphs_fits(self, start: Start, support: Any, tasks: int) -> bool:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(support))
        if shapes not in self._graphs_fit:
            loop = self.inner_loop(start, order=2)
            with ReplayState(self.device, self.model).replayed():
                self._graphs_fit[shapes] = graphs_fit(
                    lambda: list(loop.steps(start, support, tasks, min(self.steps, 1))), self.steps, self.device
                )
        return self._graphs_fit[shapes]

    def _use_task_model(self, model: nn.Module, task_batching: str) -> None:
        """Tasks compute with ``model``: by default the learner's; some algorithms put that into another one."""
        # Not submodules of this one: they hold the model again, under other names.
        self.task_losses = TaskLosses(model, self.loss_fn, task_batching)
        self._task_model = TaskModel(model, task_batching, in_steps=False)

    def _rated(self, adapted: Params) -> Params:
        """The parameters that learned rates are for, where these are adapted."""
        return adapted

    def _names_for_tasks(self, params: Params) -> Params:
        """Parameters of the model by the names that they have in the model that tasks compute with."""
        return params
