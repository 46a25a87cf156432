"""The inner loop as one differentiable function of the shared parameters.

Step k computes every task's gradient at its θ_k and applies the rule. Forward keeps either the graphs of all steps or,
with checkpointing, only θ_k: backward then rebuilds one step's graph at a time, takes the rule's vector-Jacobian product
around one Hessian-vector product, and frees it. Both give the same gradient; memory is that of K steps or of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from metafast.backend import requested_backend, use_backend
from metafast.inner import Rule
from metafast.meta.tasks import Params, TaskLosses
from metafast.ops.task_update import task_update


class Adapted(NamedTuple):
    """What the inner loop gives: parameters ``[T, *shape]`` by name, and each step's support losses ``[K, T]``."""

    params: Params
    losses: Tensor


@dataclass(frozen=True)
class InnerLoop:
    """K steps of a rule from shared parameters, for all tasks side by side.

    Args:
        losses: the losses of all tasks.
        rule: the update rule.
        order: 2 keeps what the exact meta-gradient needs; 1 takes the inner gradients as constants (FOMAML, Finn et al.
            2017, section 5.2).
        checkpoint: rebuild each step's graph in the backward pass instead of keeping it.
    """

    losses: TaskLosses
    rule: Rule
    order: int = 2
    checkpoint: bool = False

    def __call__(self, params: Params, support: Any, tasks: int, steps: int) -> Adapted:
        """Adapts ``tasks`` copies of ``params`` (``[*shape]``, by name) for ``steps`` steps on ``support``."""
        names, values = list(params), list(params.values())
        state: list[Tensor] = []
        losses = []
        for step in range(steps):
            step_of = _Step(self, names, support, tasks, step)
            if self.order == 2 and self.checkpoint:
                outputs = _CheckpointedStep.apply(step_of, *values, *state)
            else:
                outputs = step_of([*values, *state], create_graph=self.order == 2)
            values, state = list(outputs[: len(names)]), list(outputs[len(names) : -1])
            losses.append(outputs[-1].detach())
        if steps == 0:
            values = [value.expand(tasks, *value.shape) for value in values]
        return Adapted(dict(zip(names, values, strict=True)), torch.stack(losses) if losses else torch.empty(0, tasks))


@dataclass(frozen=True)
class _Step:
    """One step as a function of tensors alone: parameters and the rule's state in, the next ones and the losses out."""

    loop: InnerLoop
    names: list[str]
    support: Any
    tasks: int
    step: int

    def __call__(self, tensors: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
        count = len(self.names)
        params, state = list(tensors[:count]), list(tensors[count:])
        # The first step's parameters are shared: every task sees them, and has a gradient of its own, through a view.
        at = [p.expand(self.tasks, *p.shape) for p in params] if self.step == 0 else params
        if not torch.is_grad_enabled():
            at = [p.detach().requires_grad_() for p in at]
        with torch.enable_grad():
            losses, _ = self.loop.losses(dict(zip(self.names, at, strict=True)), self.support)
            # A parameter that the loss does not reach has the gradient 0, and stays.
            grads = torch.autograd.grad(
                losses.sum(), at, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        names = self.loop.rule.state_names if self.loop.rule.keeps_state else ()
        before = {name: state[i * count : (i + 1) * count] for i, name in enumerate(names)} if state else None
        params, after = task_update(self.loop.rule, params, list(grads), before, step=self.step)
        return (*params, *(tensor for name in names for tensor in after[name]), losses)


class _CheckpointedStep(Function):
    """A step that keeps its inputs instead of its graph."""

    @staticmethod
    def forward(ctx: Any, step: _Step, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.surroundings = _Surroundings(tensors[0].device)
        ctx.save_for_backward(*tensors)
        outputs = step(tensors, create_graph=False)
        losses = outputs[-1].detach()
        ctx.mark_non_differentiable(losses)
        return (*(output.detach() for output in outputs[:-1]), losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad(), ctx.surroundings.replayed():
            outputs = ctx.step(inputs, create_graph=True)[:-1]
        return (None, *torch.autograd.grad(outputs, inputs, grads[:-1], allow_unused=True))


class _Surroundings:
    """What a step depends on besides its inputs: computed again, it takes the same backend and draws the same dropout."""

    def __init__(self, device: torch.device) -> None:
        self._backend = requested_backend()
        self._devices = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(d) for d in self._devices]

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices), use_backend(self._backend):
            torch.set_rng_state(self._cpu)
            for device, saved in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(saved, device)
            yield
