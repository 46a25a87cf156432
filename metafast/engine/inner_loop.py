"""The inner loop as one differentiable function of the shared parameters.

Step k computes every task's gradient at its θ_k and applies the rule. Forward keeps either a step's graph or,
with checkpointing, only θ_k: backward then rebuilds one step's graph at a time, takes the rule's vector-Jacobian product
around one Hessian-vector product, and frees it. Both give the same gradient; memory is that of K steps or of one. Where
some are kept, they are the last ones: the backward pass has freed them before it rebuilds the first graph.

The product is reverse over reverse. Forward over reverse (Pearlmutter, Neural Computation 1994) does the same matrix
products of a rebuilt step. It cannot use kept graphs, saves hardly any memory and is slower (``bench meta_step --select
hessian``). There is no such variant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.computed_once import once
from metafast.engine.embedding_rows import Found, Lookups, Rows, TaskParams, grown, looking_up, no_rows
from metafast.engine.recompute_step import Recomputable, is_rebuilding, recomputed
from metafast.engine.task_batch import Params, PerStep, micro_batches, support_at
from metafast.inner import Rule
from metafast.ops.task_update import only_derivatives, task_update


class Losses(Protocol):
    """The losses ``[T]`` and metrics of all tasks, as :class:`metafast.engine.task_model.TaskLosses` computes them."""

    model: nn.Module

    def compute(self, own: TaskParams, shared: Params, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[T]`` and metrics at parameters ``[T, *shape]`` (own) and ``[*shape]`` (shared)."""
        ...


class RatesAt(Protocol):
    """The learned rates of a step, as ``task_update`` takes them."""

    def __call__(self, step: int) -> dict[str, Any]:
        """Rates of the step, by name."""
        ...


def no_rates(step: int) -> dict[str, Any]:
    """No learned rates: all rates are numbers of the rule."""
    return {}


class Adapted(NamedTuple):
    """The result of the inner loop: parameters ``[T, *shape]`` by name, and the support losses ``[K, T]`` of each step.

    Of the parameters that :attr:`Start.tables` names there are :class:`~metafast.engine.embedding_rows.Rows`.
    """

    params: TaskParams
    losses: Tensor

    @staticmethod
    def joined(chunks: Sequence[Adapted]) -> Adapted:
        """The result for all tasks, from the results for chunks of them."""
        params = pytree.tree_map(lambda *parts: torch.cat(parts), *(chunk.params for chunk in chunks))
        return Adapted(params, torch.cat([chunk.losses for chunk in chunks], dim=1))


@dataclass(frozen=True)
class Start:
    """The start of the inner loop.

    Args:
        params: parameters to adapt, ``[*shape]``, at first the same for all tasks.
        shared: other parameters, ``[*shape]``. The losses depend on them; no step changes or copies them.
        own: further parameters to adapt, ``[T, *shape]``: one per task from the start.
        rates: the learned rates of a step, by its number.
        tables: names among ``params`` of embeddings of which the rows that are looked up are adapted. ``shared`` holds them
            too: other rows are read there.
    """

    params: Params
    shared: Params = field(default_factory=dict)
    own: Params = field(default_factory=dict)
    rates: RatesAt = no_rates
    tables: frozenset[str] = frozenset()


@dataclass(frozen=True)
class InnerLoop:
    """K steps of a rule from shared parameters, for all tasks side by side.

    Args:
        losses: the losses that the steps minimise.
        rule: the update rule.
        order: 2 for the exact meta-gradient; 1 takes the inner gradients as constants (FOMAML, Finn et al. 2017,
            section 5.2).
        rebuilt_steps: of so many steps, the first ones, each one's graph is rebuilt in the backward pass and not kept.
        micro_batches: number of parts into which a step cuts the examples of its support sets. It adds up their gradients.
        after_first_step: called with the first step's results.
        is_large: whether graphs consist of large tensors, as for :func:`metafast.engine.recompute_step.recomputed`.
    """

    losses: Losses
    rule: Rule
    order: int = 2
    rebuilt_steps: int = 0
    micro_batches: int = 1
    after_first_step: Callable[[Any], None] | None = None
    is_large: bool = False

    def run(self, start: Start, support: Any, tasks: int, steps: int) -> Adapted:
        """Adapts ``tasks`` copies of the parameters for ``steps`` steps on ``support``."""
        params = self.unadapted(start, tasks)
        losses: list[Tensor] = []
        for after, step_losses in self.steps(start, support, tasks, steps):
            params = after
            losses.append(step_losses)
        device = pytree.tree_leaves(params)[0].device
        return Adapted(params, torch.stack(losses) if losses else torch.empty(0, tasks, device=device))

    def steps(self, start: Start, support: Any, tasks: int, steps: int) -> Iterator[tuple[TaskParams, Tensor]]:
        """Per step: the parameters ``[T, *shape]`` after it, and the support losses ``[T]`` before it, without a graph."""
        tables = {name: no_rows(start.params[name], tasks) for name in start.tables}
        params: TaskParams = {**start.params, **start.own, **tables}
        state: dict[str, Params] = {}
        for number in range(steps):
            growing = number == 0 or isinstance(support, PerStep)
            step = functools.partial(
                self._step, support_at(support, number), tasks, number, frozenset(start.own), growing
            )
            inputs = (params, state, start.shared, start.rates(number))
            params, state, losses = self.differentiable(step, inputs, number)
            if number == 0 and self.after_first_step is not None:
                self.after_first_step((params, state))
            yield params, losses.detach()

    def differentiable(self, function: Recomputable, inputs: Any, number: int) -> Any:
        """``function(inputs, create_graph)``, with its graph kept or rebuilt in the backward pass as that of a step."""
        second = self.order == 2 and torch.is_grad_enabled()
        if second and number < self.rebuilt_steps:
            return recomputed(function, inputs, self.losses.model, is_large=self.is_large)
        return function(inputs, second)

    @staticmethod
    def unadapted(start: Start, tasks: int) -> Params:
        """Every task's parameters before the first step, as views of the shared ones."""
        return {**{name: p.expand(tasks, *p.shape) for name, p in start.params.items()}, **start.own}

    def _step(
        self,
        batch: Any,
        tasks: int,
        number: int,
        own: frozenset[str],
        growing: bool,
        inputs: tuple[TaskParams, dict[str, Params], Params, dict[str, Any]],
        create_graph: bool,
    ) -> tuple[TaskParams, dict[str, Params], Tensor]:
        """One step as a function of tensors alone: parameters, state and rates in, the next ones and the losses out.

        Args:
            batch: the support sets.
            tasks: their number.
            number: number of the step, from 0.
            own: names of the parameters that are one per task before the first step.
            growing: whether rows of embeddings are looked up that no step before has looked up.
            inputs: parameters to adapt, the rule's state, shared parameters, rates.
            create_graph: whether the inner gradients get a graph.
        """
        params, state, shared, rates = inputs
        # The first step's parameters are shared: every task sees them, and has a gradient of its own, through a view.
        at: TaskParams = {
            name: p if isinstance(p, Rows) or number > 0 or name in own else p.expand(tasks, *p.shape)
            for name, p in params.items()
        }
        lookups = Lookups(growing) if any(isinstance(p, Rows) for p in at.values()) else None
        losses, grads, found = self._gradients(batch, (at, shared), create_graph, lookups, number < self.rebuilt_steps)
        tensors, ids = dict[str, Tensor](), dict[str, Tensor]()
        for name, p in params.items():
            if not isinstance(p, Rows):
                tensors[name] = p
                continue
            if growing:
                states = [state[key][name] for key in state]
                p, grads[name], states = grown(p, shared[name], found.get(name, []), states, in_graph=create_graph)
                state = {key: {**state[key], name: tensor} for key, tensor in zip(state, states, strict=True)}
            tensors[name], ids[name] = p
        with only_derivatives(is_rebuilding()):
            tensors, state = task_update(self.rule, tensors, grads, state or None, rates=rates or None, step=number)
        return {n: Rows(p, ids[n]) if n in ids else p for n, p in tensors.items()}, state, losses.detach()

    def _gradients(
        self,
        batch: Any,
        at: tuple[TaskParams, Params],
        create_graph: bool,
        lookups: Lookups | None,
        rebuilt: bool,
    ) -> tuple[Tensor, Params, dict[str, list[Found]]]:
        """Every task's loss and gradient on its support set, and the rows of embeddings that are looked up.

        The graphs of micro-batches are rebuilt one by one where that of the step is.
        """
        if self.micro_batches == 1:
            return self._gradient(batch, lookups, at, create_graph)
        # Mean losses of parts, and their gradients, weighted by the examples in them, add up to those of the whole.
        losses, grads = [], []
        for share, part in micro_batches(batch, self.micro_batches):
            gradient = functools.partial(self._gradient, part, None)
            if create_graph and rebuilt:
                part_losses, part_grads, _ = recomputed(gradient, at, self.losses.model)
            else:
                part_losses, part_grads, _ = gradient(at, create_graph)
            losses.append(share * part_losses)
            grads.append({name: share * grad for name, grad in part_grads.items()})
        return torch.stack(losses).sum(0), {name: sum(part[name] for part in grads) for name in grads[0]}, {}

    def _gradient(
        self, batch: Any, lookups: Lookups | None, inputs: tuple[TaskParams, Params], create_graph: bool
    ) -> tuple[Tensor, Params, dict[str, list[Found]]]:
        """Every task's loss and gradient on a batch.

        Of embeddings whose rows are adapted, the gradient is that by the rows: in the third result where ``lookups`` grows.
        """
        at, shared = inputs
        if not create_graph:
            with once():
                shared = {name: p.detach() for name, p in shared.items()}
        if not torch.is_grad_enabled():
            at = pytree.tree_map(lambda p: p.detach().requires_grad_(p.is_floating_point()), at)
        leaves = {name: p.values if isinstance(p, Rows) else p for name, p in at.items()}
        if lookups is not None and lookups.growing:
            grown_names = [name for name, p in at.items() if isinstance(p, Rows)]
            shared = {**shared, **{name: _tracked(shared[name]) for name in grown_names}}
            leaves = {name: p for name, p in leaves.items() if name not in grown_names}
        with torch.enable_grad(), looking_up(lookups):
            losses, _ = self.losses.compute(at, shared, batch)
            rows = []
            if lookups is not None:
                lookups.finish()
                rows = lookups.leaves()
            grads = torch.autograd.grad(
                losses.sum(), [*leaves.values(), *rows], create_graph=create_graph, allow_unused=True
            )
        found = {}
        if lookups is not None:
            found = lookups.found(grads[len(leaves) :])
            lookups.report()
        # A parameter that the loss does not reach has the gradient 0, and stays.
        own = {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(leaves.items(), grads[: len(leaves)], strict=True)
        }
        return losses.detach(), own, found


def _tracked(weight: Tensor) -> Tensor:
    """The weight, so that rows of it are in a graph."""
    return weight if weight.requires_grad else weight.detach().requires_grad_()
