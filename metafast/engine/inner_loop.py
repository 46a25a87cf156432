"""The inner loop as one differentiable function of the shared parameters.

Step k computes every task's gradient at its θ_k and applies the rule. Forward keeps either the graphs of all steps or,
with checkpointing, only θ_k: backward then rebuilds one step's graph at a time, takes the rule's vector-Jacobian product
around one Hessian-vector product, and frees it. Both give the same gradient; memory is that of K steps or of one.

The product is reverse over reverse. Forward over reverse (Pearlmutter, Neural Computation 1994) does the same matrix
products of a rebuilt step. It cannot use kept graphs, saves hardly any memory and is slower (``bench meta_step --select
hessian``). There is no such variant.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from metafast.computed_once import once
from metafast.engine.recompute_step import Recomputable, recomputed
from metafast.engine.task_batch import Params, micro_batches, support_at
from metafast.inner import Rule
from metafast.ops.task_update import task_update


class Losses(Protocol):
    """The losses ``[T]`` and metrics of all tasks, as :class:`metafast.engine.task_model.TaskLosses` computes them."""

    model: nn.Module

    def compute(self, own: Params, shared: Params, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
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
    """The result of the inner loop: parameters ``[T, *shape]`` by name, and the support losses ``[K, T]`` of each step."""

    params: Params
    losses: Tensor

    @staticmethod
    def joined(chunks: Sequence[Adapted]) -> Adapted:
        """The result for all tasks, from the results for chunks of them."""
        params = {name: torch.cat([chunk.params[name] for chunk in chunks]) for name in chunks[0].params}
        return Adapted(params, torch.cat([chunk.losses for chunk in chunks], dim=1))


@dataclass(frozen=True)
class Start:
    """The start of the inner loop.

    Args:
        params: parameters to adapt, ``[*shape]``, at first the same for all tasks.
        shared: other parameters, ``[*shape]``. The losses depend on them; no step changes or copies them.
        own: further parameters to adapt, ``[T, *shape]``: one per task from the start.
        rates: the learned rates of a step, by its number.
    """

    params: Params
    shared: Params = field(default_factory=dict)
    own: Params = field(default_factory=dict)
    rates: RatesAt = no_rates


@dataclass(frozen=True)
class InnerLoop:
    """K steps of a rule from shared parameters, for all tasks side by side.

    Args:
        losses: the losses that the steps minimise.
        rule: the update rule.
        order: 2 for the exact meta-gradient; 1 takes the inner gradients as constants (FOMAML, Finn et al. 2017,
            section 5.2).
        checkpoint: rebuild each step's graph in the backward pass instead of keeping it.
        micro_batches: number of parts into which a step cuts the examples of its support sets. It adds up their gradients.
    """

    losses: Losses
    rule: Rule
    order: int = 2
    checkpoint: bool = False
    micro_batches: int = 1

    def run(self, start: Start, support: Any, tasks: int, steps: int) -> Adapted:
        """Adapts ``tasks`` copies of the parameters for ``steps`` steps on ``support``."""
        params = self.unadapted(start, tasks)
        losses: list[Tensor] = []
        for after, step_losses in self.steps(start, support, tasks, steps):
            params = after
            losses.append(step_losses)
        device = next(iter(params.values())).device
        return Adapted(params, torch.stack(losses) if losses else torch.empty(0, tasks, device=device))

    def steps(self, start: Start, support: Any, tasks: int, steps: int) -> Iterator[tuple[Params, Tensor]]:
        """Per step: the parameters ``[T, *shape]`` after it, and the support losses ``[T]`` before it, without a graph."""
        params: Params = {**start.params, **start.own}
        state: dict[str, Params] = {}
        for number in range(steps):
            step = functools.partial(self._step, support_at(support, number), tasks, number, frozenset(start.own))
            inputs = (params, state, start.shared, start.rates(number))
            params, state, losses = self.differentiable(step, inputs)
            yield params, losses.detach()

    def differentiable(self, function: Recomputable, inputs: Any) -> Any:
        """``function(inputs, create_graph)``, with its graph kept or rebuilt in the backward pass."""
        second = self.order == 2 and torch.is_grad_enabled()
        if second and self.checkpoint:
            return recomputed(function, inputs, self.losses.model)
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
        inputs: tuple[Params, dict[str, Params], Params, dict[str, Any]],
        create_graph: bool,
    ) -> tuple[Params, dict[str, Params], Tensor]:
        """One step as a function of tensors alone: parameters, state and rates in, the next ones and the losses out.

        Args:
            batch: the support sets.
            tasks: their number.
            number: number of the step, from 0.
            own: names of the parameters that are one per task before the first step.
            inputs: parameters to adapt, the rule's state, shared parameters, rates.
            create_graph: whether the inner gradients get a graph.
        """
        params, state, shared, rates = inputs
        # The first step's parameters are shared: every task sees them, and has a gradient of its own, through a view.
        at = {name: p.expand(tasks, *p.shape) if number == 0 and name not in own else p for name, p in params.items()}
        losses, grads = self._gradients(batch, (at, shared), create_graph)
        params, state = task_update(self.rule, params, grads, state or None, rates=rates or None, step=number)
        return params, state, losses.detach()

    def _gradients(self, batch: Any, at: tuple[Params, Params], create_graph: bool) -> tuple[Tensor, Params]:
        """Every task's loss and gradient on its support set."""
        if self.micro_batches == 1:
            return self._gradient(batch, at, create_graph)
        # Mean losses of parts, and their gradients, weighted by the examples in them, add up to those of the whole.
        losses, grads = [], []
        for share, part in micro_batches(batch, self.micro_batches):
            gradient = functools.partial(self._gradient, part)
            if create_graph and self.checkpoint:
                part_losses, part_grads = recomputed(gradient, at, self.losses.model)
            else:
                part_losses, part_grads = gradient(at, create_graph)
            losses.append(share * part_losses)
            grads.append({name: share * grad for name, grad in part_grads.items()})
        return torch.stack(losses).sum(0), {name: sum(part[name] for part in grads) for name in grads[0]}

    def _gradient(self, batch: Any, inputs: tuple[Params, Params], create_graph: bool) -> tuple[Tensor, Params]:
        """Every task's loss and gradient on a batch."""
        at, shared = inputs
        if not create_graph:
            with once():
                shared = {name: p.detach() for name, p in shared.items()}
        if not torch.is_grad_enabled():
            at = {name: p.detach().requires_grad_() for name, p in at.items()}
        with torch.enable_grad():
            losses, _ = self.losses.compute(at, shared, batch)
            grads = torch.autograd.grad(losses.sum(), list(at.values()), create_graph=create_graph, allow_unused=True)
        # A parameter that the loss does not reach has the gradient 0, and stays.
        return losses.detach(), {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(at.items(), grads, strict=True)
        }
