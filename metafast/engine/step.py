"""One call of a meta-learner, in the order of this file: weights, tasks left out, chunks of tasks, capture, losses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.engine.capture import Capture
from metafast.engine.embedding_rows import WholeTableError, refuse_missed, sparse_gradients, watching_for_missed
from metafast.engine.finite import check_finite, describe_not_finite, finite_tasks
from metafast.engine.freed_memory import give_back
from metafast.engine.memory_plan import MemoryChoice, MemoryPlan, PlanChangedError
from metafast.engine.precomputed_gradients import with_precomputed_gradients
from metafast.engine.reduction import Ranks, check_weights
from metafast.engine.replay_state import Buffers
from metafast.engine.sharded_parameters import Whole, check_replicated, is_sharded, mean_over_ranks
from metafast.engine.state_after_call import StateBefore
from metafast.engine.task_batch import Params, check_batches, select_tasks
from metafast.engine.task_model import OrderMattersError
from metafast.engine.untracked_leaves import UntrackedLeafError, find_untracked, refuse_untracked

logger = logging.getLogger("metafast")


class Outcome(NamedTuple):
    """Losses, metrics and left-out tasks of a call, without a graph.

    Attributes:
        support_losses: ``[K, T]``, the support loss of each task before each inner step.
        query_losses: ``[T]``, the query loss of each task after the last inner step; None where there was no query set.
        metrics: the metrics that ``loss_fn`` gave for the query set, by name, ``[T, ...]`` each.
        skipped: numbers of the tasks that were left out since one of their losses was not finite.
        memory: what ``"auto"`` has chosen for tasks side by side and kept graphs; None where there was nothing to choose.
    """

    support_losses: Tensor
    query_losses: Tensor | None
    metrics: dict[str, Tensor]
    skipped: tuple[int, ...] = ()
    memory: MemoryChoice | None = None


class TaskResults(NamedTuple):
    """The results of an algorithm for the tasks of a call.

    Attributes:
        losses: ``[T]``; the meta-gradient is the gradient of their weighted mean or sum.
        support_losses: as in :class:`Outcome`; their graph is not used.
        query_losses: likewise.
        metrics: likewise.
    """

    losses: Tensor
    support_losses: Tensor
    query_losses: Tensor | None
    metrics: dict[str, Tensor]

    def without_graph(self) -> TaskResults:
        """The same numbers, detached."""
        return TaskResults(
            self.losses.detach(),
            self.support_losses.detach(),
            None if self.query_losses is None else self.query_losses.detach(),
            {name: metric.detach() for name, metric in self.metrics.items()},
        )


# Of support, query and weights: the weighted sum of the tasks' losses, and the results.
OverChunks: TypeAlias = Callable[[Any, Any, Tensor], tuple[Tensor, TaskResults]]


class Learner(Protocol):
    """The attributes and methods of a meta-learner that a step uses; :class:`metafast.MetaLearner` documents them."""

    model: nn.Module
    steps: int
    tasks_per_chunk: int | Literal["auto"] | None
    reduction: str
    on_nonfinite: str
    capture: bool
    memory_plan: MemoryPlan
    outcome: Outcome | None

    @property
    def device(self) -> torch.device: ...

    def task_results(self, support: Any, query: Any, tasks: int) -> TaskResults: ...

    def trained_parameters(self) -> Params: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def first_forward(self, support: Any) -> frozenset[str]: ...

    def computing_once(self, *batches: Any) -> AbstractContextManager[None]: ...

    def tables(self) -> list[Tensor]: ...

    def adapt_whole(self, error: WholeTableError) -> None: ...


class Step:
    """The calls of a meta-learner.

    Args:
        learner: the meta-learner.
        capture: the learner's recorded programs.
    """

    def __init__(self, learner: Learner, capture: Capture) -> None:
        self._learner = learner
        self._capture = capture
        self._ran_before_recording = False
        self._ranks_agree = False

    def loss(self, support: Any, query: Any, task_weights: Tensor | None) -> Tensor:
        """The weighted mean or sum of the tasks' losses, whose ``backward()`` leaves the meta-gradient."""
        learner = self._learner
        whole = self.whole_parameters()
        ranks = Ranks(learner.reduction, learner.device, sharded=whole is not None)
        with ranks.failing_together():
            tasks = check_batches(support, query, learner.steps)
            weights = check_weights(task_weights, tasks, learner.device)
            over_chunks = self._over_chunks
            if whole is not None:
                over_chunks = functools.partial(self._over_chunks_gathered, whole, ranks)
                ranks.check_same_tasks(tasks)
                if not self._ranks_agree:
                    check_replicated(dict(learner.named_parameters()))
                    self._ranks_agree = True
            total, weights = self.in_order(lambda: self._over_finite_tasks(over_chunks, support, query, weights))
            return total / ranks.divisor(weights)

    def whole_parameters(self) -> Whole | None:
        """What gathers the learner's parameters where they are sharded; None where they are not.

        Raises:
            ValueError: the sharding, or an option with it, is not served.
        """
        learner = self._learner
        module = cast(nn.Module, learner)
        if not is_sharded(module):
            return None
        if learner.capture:
            raise ValueError(
                "capture: expected False with sharded parameters, which a replay would need whole, got True"
            )
        if learner.on_nonfinite != "raise":
            raise ValueError(
                "on_nonfinite: expected 'raise', since ranks gather sharded parameters together and none can repeat a call, "
                "got 'skip'"
            )
        return Whole(module)

    def in_order(self, call: Callable[[], Any]) -> Any:
        """``call()``, repeated where it finds out that it has to be made in another way.

        Where the order of the model's calls matters, with one task after another; where rows of an embedding cannot be
        adapted alone, with the whole of it; where chunks of tasks were our choice and cannot be, with all side by side;
        where its first step shows that its graphs do not fit, with fewer of them.
        """
        before = StateBefore(self._learner.model, self._learner.device)
        while True:
            try:
                return call()
            except OrderMattersError as error:
                before.restore()
                logger.warning("%s; it is set", error)
                self._learner.tasks_per_chunk = 1
            except WholeTableError as error:
                before.restore()
                self._learner.adapt_whole(error)
            except UntrackedLeafError as error:
                if self._learner.tasks_per_chunk != "auto" or self._learner.capture:
                    raise
                before.restore()
                logger.info("%s; all tasks run side by side", error)
                self._learner.tasks_per_chunk = None
            except PlanChangedError:
                before.restore()

    def _over_finite_tasks(
        self, over_chunks: OverChunks, support: Any, query: Any, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the losses of all tasks whose losses are finite, and the weights of these tasks."""
        learner = self._learner
        buffers = Buffers(learner.model) if learner.on_nonfinite == "skip" else None
        total, results = over_chunks(support, query, weights)
        losses = results.support_losses, results.query_losses
        outcome = learner.outcome = Outcome(
            *losses, results.metrics, memory=learner.memory_plan.choice(support, len(weights))
        )
        if buffers is None:
            check_finite(*losses)
            return total, weights
        finite = finite_tasks(*losses)
        if finite.all():
            return total, weights
        logger.warning("tasks are skipped: %s", "; ".join(describe_not_finite(*losses)))
        learner.outcome = outcome._replace(skipped=tuple((~finite).nonzero()[:, 0].tolist()))
        buffers.restore()
        if finite.any():
            # Again without them: in the backward pass, 0 times what is not finite would reach the shared parameters.
            support, query = select_tasks(support, finite), select_tasks(query, finite)
            return over_chunks(support, query, weights[finite])[0], weights[finite]
        params = list(learner.trained_parameters().values())
        zero = torch.zeros((), dtype=total.dtype, device=total.device)
        return with_precomputed_gradients(zero, [torch.zeros_like(p) for p in params], params), weights[finite]

    def _over_chunks_gathered(
        self, whole: Whole, ranks: Ranks, support: Any, query: Any, weights: Tensor
    ) -> tuple[Tensor, TaskResults]:
        """The weighted sum of losses, and the results, of a sharded model; backward takes the gradients' mean over ranks."""
        with whole.placed(), ranks.gathering(), whole.gathered():
            total, results = self._over_chunks(support, query, weights, whole)
            return total, whole.own(results)

    def _over_chunks(
        self, support: Any, query: Any, weights: Tensor, whole: Whole | None = None
    ) -> tuple[Tensor, TaskResults]:
        """The weighted sum of losses, and the results: of all tasks at once, or of chunks that compute their gradients.

        What a sharded model needs in its backward pass is gathered inside of the call: there is one chunk at least.
        """
        tasks = len(weights)
        size = self._learner.memory_plan.tasks_per_chunk(support, query, tasks)
        if size >= tasks and not self._learner.capture and whole is None:
            total, results, missed = self._weighted(support, query, weights)
            refuse_missed(missed)
            return total, results
        if torch.is_grad_enabled() and any(
            leaf.requires_grad for leaf in pytree.tree_leaves((support, query)) if leaf is not None
        ):
            raise ValueError(
                "support, query: with capture or tasks_per_chunk only parameters get gradients; expected tensors that "
                "require none"
            )
        params = list(self._learner.trained_parameters().values())
        gradients: list[Tensor | None] = [None] * len(params)
        sums = set[int]()
        totals, chunks = [], []
        for first in range(0, tasks, size):
            chunk = slice(first, first + size)
            total, of_chunk, results = self._with_gradients(
                select_tasks(support, chunk), select_tasks(query, chunk), weights[chunk]
            )
            _add(gradients, of_chunk, sums)
            totals.append(total)
            chunks.append(results)
        total = torch.stack(totals).sum()
        # Not those of an embedding that a user has made sparse.
        tables = {id(p) for p in self._learner.tables()}
        for index, (p, gradient) in enumerate(zip(params, gradients, strict=True)):
            if id(p) in tables and gradient is not None and gradient.is_sparse:
                gradients[index] = gradient.coalesce().to_dense()
                sums.add(index)
        if whole is None:
            return with_precomputed_gradients(total, gradients, params, owned=sums), _joined(chunks)
        shards = whole.sharded(params)
        return with_precomputed_gradients(total, gradients, shards, mean_over_ranks), _joined(chunks)

    def _with_gradients(
        self, support: Any, query: Any, weights: Tensor
    ) -> tuple[Tensor, list[Tensor | None], TaskResults]:
        """The weighted sum of losses, without a graph, and its gradients by the learner's trained parameters."""

        def step(
            support: Any, query: Any, weights: Tensor
        ) -> tuple[Tensor, dict[str, dict[str, Tensor | None]], TaskResults, dict[str, list[Tensor]]]:
            # A recording holds no sparse tensors.
            with sparse_gradients(not self._learner.capture):
                total, results, missed = self._weighted(support, query, weights)
            params = self._learner.trained_parameters()
            if not total.requires_grad:
                return total, {"gradient": dict.fromkeys(params)}, results, missed
            leaves = list(params.values())
            # A recording refuses untracked leaves by itself.
            found = []
            if not self._learner.capture:
                found = find_untracked([total.grad_fn], leaves)
                if self._learner.memory_plan.has_large_graphs(support):
                    # The forward pass has left gaps, and the backward pass takes the most memory.
                    give_back()
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            total = total.detach()
            refuse_untracked(found, "tasks_per_chunk")
            return total, {"gradient": dict(zip(params, grads, strict=True))}, results, missed

        total, gradients, results, missed = self.replay_or_compute("step", step, support, query, weights)
        refuse_missed(missed)
        return total, list(gradients["gradient"].values()), results

    def replay_or_compute(
        self, name: str, function: Callable[..., Any], support: Any, *arguments: Any, update_buffers: bool = True
    ) -> Any:
        """``function(support, *arguments)``: replayed where the learner captures, else computed.

        Args:
            name: name of the program.
            function: function of the support set and the arguments.
            support: support set.
            arguments: further pytrees of tensors.
            update_buffers: as for :meth:`metafast.engine.capture.Capture.replay`.
        """
        if not self._learner.capture:
            return function(support, *arguments)
        if not self._ran_before_recording:
            self._run_before_recording(support)
        return self._capture.replay(name, function, support, *arguments, update_buffers=update_buffers)

    def _run_before_recording(self, support: Any) -> None:
        """An ordinary forward finds out how tasks can run, which a recording, without values, cannot."""
        before = StateBefore(self._learner.model, self._learner.device)
        with torch.no_grad():
            settled = self._learner.first_forward(support)
        # What is the same after each call, such as a mask, need not be made again while recording.
        if {change.path for change in before.changes()} <= settled:
            before.restore_random()
        else:
            before.restore()
        self._ran_before_recording = True

    def _weighted(
        self, support: Any, query: Any, weights: Tensor
    ) -> tuple[Tensor, TaskResults, dict[str, list[Tensor]]]:
        """The weighted sum of losses with its graph, the results of the tasks, and whether rows were missed."""
        with self._learner.computing_once(support, query), watching_for_missed() as missed:
            results = self._learner.task_results(support, query, len(weights))
        total = (results.losses * weights.to(results.losses.dtype)).sum()
        return total, results.without_graph(), missed


def _add(gradients: list[Tensor | None], more: list[Tensor | None], sums: set[int]) -> None:
    """Adds ``more`` to ``gradients``, one per parameter. ``more`` is emptied meanwhile: two sets are held, and not three.

    ``sums`` says which of ``gradients`` are sums already. Those of one chunk may share memory, and are not written to.
    """
    for index, gradient in enumerate(gradients):
        other, more[index] = more[index], None
        if gradient is None or other is None:
            gradients[index] = other if gradient is None else gradient
        elif index in sums and not gradient.is_sparse:
            gradient += other
        else:
            # A sum of sparse ones is sparse, and grows.
            gradients[index] = other + gradient if gradient.is_sparse else gradient + other
            sums.add(index)


def _joined(chunks: list[TaskResults]) -> TaskResults:
    """The results of all tasks, from those of chunks of them."""
    query_losses = [results.query_losses for results in chunks if results.query_losses is not None]
    return TaskResults(
        torch.cat([results.losses for results in chunks]),
        torch.cat([results.support_losses for results in chunks], dim=1),
        torch.cat(query_losses) if query_losses else None,
        {name: torch.cat([results.metrics[name] for results in chunks]) for name in chunks[0].metrics},
    )
