"""What every meta-learning algorithm has: a model, a loss, an inner loop, and adaptation without a graph."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.backend import BackendUnavailableError
from metafast.inner import Rule
from metafast.meta.capture import Captured
from metafast.meta.finite import check_finite, finite_tasks, not_finite
from metafast.meta.inference import outside_inference_mode, usable
from metafast.meta.inner_loop import Adapted, InnerLoop, Start
from metafast.meta.learners import Learners
from metafast.meta.leaves import refuse, strangers
from metafast.meta.memory import graphs_fit
from metafast.meta.parameters import Chosen, Parts, Selection
from metafast.meta.rates import LearnedRates
from metafast.meta.reduction import Ranks, check_reduction, checked_weights
from metafast.meta.state_after_call import StateBefore
from metafast.meta.surroundings import Buffers, Surroundings
from metafast.meta.task_function import OrderMattersError, TaskFunction, TaskLosses
from metafast.meta.tasks import LossFn, Params, check_support_steps, count_tasks, select_tasks, support_at
from metafast.meta.with_gradients import with_gradients

logger = logging.getLogger("metafast")


class Options(TypedDict, total=False):
    """Keywords of every algorithm; :class:`MetaLearner` says what they mean."""

    checkpoint: bool | Literal["auto"]
    task_batching: str
    adapt_parameters: Selection | None
    micro_batches: int
    tasks_per_chunk: int | None
    reduction: str
    on_nonfinite: str
    capture: bool
    capture_check: int
    cuda_graph: bool


class Outcome(NamedTuple):
    """What a call saw, without a graph.

    Attributes:
        support_losses: ``[K, T]``, before each inner step.
        query_losses: ``[T]``, after the last; None where there was no query set.
        metrics: of the query set, ``[T, ...]`` each.
        skipped: tasks that were left out since a loss of theirs was not finite.
    """

    support_losses: Tensor
    query_losses: Tensor | None
    metrics: dict[str, Tensor]
    skipped: tuple[int, ...] = ()


class Run(NamedTuple):
    """What an algorithm computes for some tasks: ``losses [T]`` with a graph, and the parts of an :class:`Outcome`."""

    losses: Tensor
    support_losses: Tensor
    query_losses: Tensor | None
    metrics: dict[str, Tensor]


class MetaLearner(nn.Module):
    """Base of the algorithms. Parameters that do not require a gradient are shared by all tasks and never adapted.

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
            graph. ``model`` and ``loss_fn`` must do the same each time: what they compute in Python is computed once, and a
            look at the values of tensors is refused, and dropout with ``checkpoint``. A gradient of the gradient is not to
            be had. Recording takes seconds; programs for the last few kinds of call are kept, each with its memory.
        capture_check: how many replays of a program, the first with other numbers than were recorded, are compared with the
            uncaptured call, which finds what a recording missed. The second and later ones are left out where comparing
            would take more than a third of what recording took. 0: none.
        cuda_graph: ``capture``, and an error where the model is not on a CUDA device.

    Attributes:
        outcome: the :class:`Outcome` of the latest call.
        rates: the learned rates, without parameters where there are none.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        FloatingPointError: from a call, when a loss is not finite; the message names task and step.
    """

    # A loss may hold its learner; what calls change in that is no state of the model.
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
        cuda_graph: bool = False,
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
        for name, value in (("capture", capture), ("cuda_graph", cuda_graph)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
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
        self.capture = capture or cuda_graph
        self.cuda_graph = cuda_graph
        self.capture_check = check_count("capture_check", capture_check)
        self._captured = Captured(self, ("model", "loss_fn"))
        self._chosen = Chosen(model, adapt_parameters)
        self.rates = LearnedRates(inner, self._rated(self._chosen.of(model).adapted), steps)
        self._use_model(model, task_batching)
        self._fits: dict[Any, bool] = {}
        self._probed = False
        self.outcome: Outcome | None = None

    @property
    def order(self) -> int:
        """1 or 2."""
        return self._order

    @order.setter
    def order(self, order: int) -> None:
        if order not in (1, 2):
            raise ValueError(f"order: expected 1 or 2, got {order!r}")
        self._order = order

    def forward(self, support: Any, query: Any, task_weights: Tensor | None = None) -> Tensor:
        """The query loss after adaptation, over tasks; its ``backward()`` leaves the algorithm's meta-gradient.

        Args:
            support, query: pytrees of tensors whose first dimension is the task, the same number of tasks in both.
                ``support`` may be a :class:`metafast.PerStep` of as many batches as there are inner steps.
            task_weights: ``[T]``, of the tasks' losses in their mean or sum; at least 0, without a gradient.
        """
        if torch.is_inference_mode_enabled():
            with outside_inference_mode():
                return self.forward(support, query, task_weights)
        support, query = usable(support), usable(query)
        device = self.device
        ranks = Ranks(self.reduction, device)
        with ranks.failing_together():
            tasks = count_tasks(support, "support")
            check_support_steps(support, self.steps)
            if query is not None:
                count_query_tasks(query, tasks)
            weights = checked_weights(task_weights, tasks, device)
            total, weights = self._in_order(lambda: self._finite_total(support, query, weights))
            return total / ranks.divisor(weights)

    def adapt(self, support: Any, steps: int | None = None) -> Learners:
        """Every task's model after ``steps`` inner steps (None: as many as in training; 0: unadapted), without a graph.

        Buffers of the model, such as running statistics, stay as they are.

        Args:
            support: as in a call.
        """
        with outside_inference_mode():
            return self._adapt(usable(support), steps)

    def _adapt(self, support: Any, steps: int | None) -> Learners:
        tasks = count_tasks(support, "support")
        steps = self.steps if steps is None else check_count("steps", steps)
        check_support_steps(support, steps)

        def adapted(support: Any) -> Adapted:
            return self._loop(order=1)(self._start(support), support, count_tasks(support, "support"), steps)

        def computed() -> tuple[Params, Tensor]:
            size = self.tasks_per_chunk or tasks
            chunks = [slice(first, first + size) for first in range(0, tasks, size)]
            found = []
            for chunk in chunks:
                with Buffers(self.model).scratch():
                    part = select_tasks(support, chunk)
                    found.append(self._computed(f"adapt {steps}", adapted, part, update_buffers=False))
            if len(found) == 1:
                return found[0]
            params = {name: torch.cat([part.params[name] for part in found]) for name in found[0].params}
            return params, torch.cat([part.losses for part in found], dim=1)

        with torch.no_grad():
            params, losses = self._in_order(computed)
        check_finite(losses, None)
        # The parameters themselves, of which a replay would give copies.
        shared = self._task_names(self._parts().shared)
        params, shared = ({name: p.detach() for name, p in own.items()} for own in (params, shared))
        return self._learners(params, shared)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @abstractmethod
    def _run(self, support: Any, query: Any, tasks: int) -> Run:
        """The losses of ``tasks`` tasks, whose gradients are the algorithm's."""

    def _use_model(self, model: nn.Module, task_batching: str) -> None:
        """What tasks compute with; some algorithms put the model into another one."""
        # Not submodules of this one: they hold the model again, under other names.
        self._losses = TaskLosses(model, self.loss_fn, task_batching)
        self._outputs = TaskFunction(model, task_batching, in_steps=False)

    def _learners(self, params: Params, shared: Params) -> Learners:
        return Learners(self._outputs, params, shared)

    def _parts(self) -> Parts:
        return self._chosen.of(self.model)

    def _start(self, support: Any) -> Start:
        adapted, shared = self._parts()
        self.rates.check_names(self._rated(adapted))
        return Start(params=adapted, shared=shared, rates=self.rates)

    def _rated(self, adapted: Params) -> Params:
        """What learned rates are for, where these parameters are adapted."""
        return adapted

    def _task_names(self, params: Params) -> Params:
        """Parameters of the model by the names that tasks compute with."""
        return params

    def _loop(self, order: int, checkpoint: bool = False) -> InnerLoop:
        return InnerLoop(self._losses, self.inner, order, checkpoint, self.micro_batches)

    def _training_loop(self, start: Start, support: Any, tasks: int) -> InnerLoop:
        """The loop of a call, with graphs kept or rebuilt."""
        return self._loop(self.order, self._rebuilds(start, support, tasks))

    def _rebuilds(self, start: Start, support: Any, tasks: int) -> bool:
        if self.checkpoint != "auto":
            return self.checkpoint
        return self.order == 2 and torch.is_grad_enabled() and not self._graphs_fit(start, support, tasks)

    def _graphs_fit(self, start: Start, support: Any, tasks: int) -> bool:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(support))
        if shapes not in self._fits:
            with Surroundings(self.device, self.model).replayed():
                self._fits[shapes] = graphs_fit(
                    lambda: list(self._loop(order=2).steps(start, support, tasks, min(self.steps, 1))),
                    self.steps,
                    self.device,
                )
        return self._fits[shapes]

    def _in_order(self, call: Callable[[], Any]) -> Any:
        """``call()``, and again with one task after another where the order of the model's calls matters."""
        before = StateBefore(self.model, self.device)
        try:
            return call()
        except OrderMattersError as error:
            before.restore()
            logger.warning("%s; it is set", error)
            self.tasks_per_chunk = 1
        return call()

    def _finite_total(self, support: Any, query: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of losses, and the weights that went into it."""
        buffers = Buffers(self.model) if self.on_nonfinite == "skip" else None
        total, run = self._total(support, query, weights)
        outcome = Outcome(run.support_losses, run.query_losses, run.metrics)
        self.outcome = outcome
        if buffers is None:
            check_finite(run.support_losses, run.query_losses)
            return total, weights
        finite = finite_tasks(run.support_losses, run.query_losses)
        if finite.all():
            return total, weights
        logger.warning("tasks are skipped: %s", "; ".join(not_finite(run.support_losses, run.query_losses)))
        self.outcome = outcome._replace(skipped=tuple((~finite).nonzero()[:, 0].tolist()))
        buffers.restore()
        if finite.any():
            # Again without them: in the backward pass, 0 times what is not finite would reach the shared parameters.
            support, query = select_tasks(support, finite), None if query is None else select_tasks(query, finite)
            return self._total(support, query, weights[finite])[0], weights[finite]
        params = list(self._trained().values())
        zero = torch.zeros((), dtype=total.dtype, device=total.device)
        return with_gradients(zero, [torch.zeros_like(p) for p in params], params), weights[finite]

    def _total(self, support: Any, query: Any, weights: Tensor) -> tuple[Tensor, Run]:
        tasks = len(weights)
        size = self.tasks_per_chunk or tasks
        if size >= tasks and not self.capture:
            return self._weighted(support, query, weights)
        if torch.is_grad_enabled() and any(
            leaf.requires_grad for leaf in pytree.tree_leaves((support, query)) if leaf is not None
        ):
            raise ValueError(
                "support, query: with capture or tasks_per_chunk parameters alone get gradients; expected tensors that "
                "require none"
            )
        params = list(self._trained().values())
        gradients: list[Tensor | None] = [None] * len(params)
        totals, runs = [], []
        for first in range(0, tasks, size):
            chunk = slice(first, first + size)
            total, parts, run = self._with_gradients(
                select_tasks(support, chunk), None if query is None else select_tasks(query, chunk), weights[chunk]
            )
            gradients = [
                part if gradient is None else gradient if part is None else gradient + part
                for gradient, part in zip(gradients, parts, strict=True)
            ]
            totals.append(total)
            runs.append(run)
        total = torch.stack(totals).sum()
        return with_gradients(total, gradients, params), Run(
            total,
            torch.cat([run.support_losses for run in runs], dim=1),
            None if query is None else torch.cat([_given(run.query_losses) for run in runs]),
            {name: torch.cat([run.metrics[name] for run in runs]) for name in runs[0].metrics},
        )

    def _with_gradients(self, support: Any, query: Any, weights: Tensor) -> tuple[Tensor, list[Tensor | None], Run]:
        """The weighted sum of losses, without a graph, and its gradients by :meth:`_trained`."""

        def step(support: Any, query: Any, weights: Tensor) -> tuple[Tensor, dict[str, dict[str, Tensor | None]], Run]:
            total, run = self._weighted(support, query, weights)
            params = self._trained()
            if not total.requires_grad:
                return total, {"gradient": dict.fromkeys(params)}, run
            leaves = list(params.values())
            # What is recorded is refused there.
            found = [] if self.capture else strangers([total], leaves)
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            total = total.detach()
            refuse(found, "tasks_per_chunk")
            return total, {"gradient": dict(zip(params, grads, strict=True))}, run

        if self.capture and self.checkpoint == "auto":
            # Looks at the memory that is free, so not while recording. A start may run the model.
            with Surroundings(self.device, self.model).replayed():
                self._rebuilds(self._start(support), support, len(weights))
        total, gradients, run = self._computed("step", step, support, query, weights)
        return total, list(gradients["gradient"].values()), run

    def _computed(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """``function(*arguments)``, replayed where ``capture`` says so, with the options of :class:`Captured`."""
        if not self.capture:
            return function(*arguments)
        if not self._probed:
            self._probe(arguments[0])
        if self.cuda_graph and self.device.type != "cuda":
            raise BackendUnavailableError(
                f"cuda_graph: expected the model on a CUDA device, got {self.device}; capture=True replays anywhere"
            )
        return self._captured(name, function, *arguments, **options)

    def _probe(self, support: Any) -> None:
        """An ordinary forward finds out how tasks can run, which a recording, without values, cannot."""
        before = StateBefore(self.model, self.device)
        with torch.no_grad():
            start = self._start(support)
            params = InnerLoop.unadapted(start, count_tasks(support, "support"))
            self._losses(params, start.shared, support_at(support, 0))
        # What is the same after each call, such as a mask, need not be made again while recording.
        if {change.path for change in before.changes()} <= self._losses.settled:
            before.restore_random()
        else:
            before.restore()
        self._probed = True

    def _weighted(self, support: Any, query: Any, weights: Tensor) -> tuple[Tensor, Run]:
        run = self._run(support, query, len(weights))
        total = (run.losses * weights.to(run.losses.dtype)).sum()
        return total, Run(
            run.losses.detach(),
            run.support_losses.detach(),
            None if run.query_losses is None else run.query_losses.detach(),
            {name: metric.detach() for name, metric in run.metrics.items()},
        )

    def _trained(self) -> Params:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def count_query_tasks(query: Any, tasks: int) -> None:
    """Raises ValueError where query has another number of tasks than support."""
    found = count_tasks(query, "query")
    if found != tasks:
        raise ValueError(f"query: expected {tasks} tasks, as many as in support, got {found}")


def check_count(name: str, count: int, minimum: int = 0) -> int:
    """``count``, or TypeError or ValueError where it is no int of at least ``minimum``."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
    if count < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {count}")
    return count


def _given(losses: Tensor | None) -> Tensor:
    assert losses is not None
    return losses
