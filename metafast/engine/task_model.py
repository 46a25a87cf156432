"""Outputs and losses of all tasks at once, each task at its own parameters."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from metafast.acceleration import accelerated_thread, replaced_names
from metafast.computed_once import anew, once
from metafast.engine.embedding_rows import TaskParams, current_lookups, repeating_lookups
from metafast.engine.embedding_table import with_tables
from metafast.engine.placed_tensors import placed
from metafast.engine.recompute_in_model import recomputed_with
from metafast.engine.replay_state import written_parameters
from metafast.engine.state_after_call import StateBefore
from metafast.engine.stray_tensors import BatchedStrays
from metafast.engine.task_batch import LossFn, Params
from metafast.engine.task_outputs import Form, put_together, stacked, taken_apart
from metafast.engine.vmap_errors import is_users_own
from metafast.ops.batching import OwnMemoryNeededError, views_of_tasks
from metafast.program import is_recording

logger = logging.getLogger("metafast")

TASK_BATCHING = ("auto", "vmap", "loop")


class OrderMattersError(RuntimeError):
    """Calls of the model change it and depend on the change: tasks have to come one after another, with all their steps.

    Args:
        paths: attributes that the calls change.
    """

    def __init__(self, paths: list[str]) -> None:
        super().__init__(
            f"each call of the model changes {', '.join(paths)}, and gives something else for it: tasks have to come one "
            "after another, each with all of its steps, as with tasks_per_chunk=1"
        )


class TaskModel:
    """A module's outputs for all tasks at once, each at its own parameters, inside :func:`metafast.accelerate`.

    Only the forward runs under ``vmap``. Derivatives are ordinary autograd on the operations that it ran on whole batches of
    tasks. Tasks share nothing, so the gradient of the summed outputs holds the gradient of each task.

    Args:
        module: any module; a call of it gives a pytree of tensors. Other leaves of the pytree are the same for all tasks.
        task_batching: ``"vmap"``, ``"loop"``, or ``"auto"``: vmap unless that gives something else than the loop does.
        prefix: put before the given names of parameters.
        in_steps: whether a task has several calls, with calls of other tasks between them.
    """

    def __init__(
        self, module: nn.Module, task_batching: str = "auto", prefix: str = "", *, in_steps: bool = True
    ) -> None:
        if task_batching not in TASK_BATCHING:
            raise ValueError(
                f"task_batching: expected one of {', '.join(map(repr, TASK_BATCHING))}, got {task_batching!r}"
            )
        self.module = module
        self._batching = task_batching
        self._prefix = prefix
        self._names = replaced_names(module)
        self._warned_of_hooks = False
        # Attributes that calls set to the same value again; see StateBefore.
        self._settled: set[str] = set()
        self._looks_outside = True
        # One call per task comes in the order of a plain loop.
        self._order_is_free = not in_steps
        self._in_own_memory = False

    def compute(
        self,
        own: TaskParams,
        shared: Params,
        inputs: tuple[Any, ...],
        named: dict[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Outputs, task dimension first.

        Args:
            own: parameters (or buffers) ``[T, *shape]`` of each task, or rows of embeddings.
            shared: parameters ``[*shape]`` that stand in for the module's, the same for all tasks; those too of which
                ``own`` has rows.
            inputs: positional arguments, task dimension first.
            named: keyword arguments, task dimension first.
            options: keyword arguments that are the same for all tasks.
        """

        def one(own: TaskParams, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return self._one(with_tables(own, shared, self._prefix), inputs, {**named, **(options or {})})

        call = _Call(one, (own, inputs, named or {}), shared)
        with accelerated_thread(self._names), once():
            if self._batching == "vmap":
                self._warn_of_hooks()
            if self._batching == "loop":
                return self._one_by_one(call)
            if self._batching == "auto" and (reason := self._hook_reason() or self._write_reason(own)) is not None:
                result = self._one_by_one(call)
                self._use_loop(reason)
                return result
            if self._batching == "vmap" and (reason := self._write_reason(own)) is not None:
                raise RuntimeError(f"task_batching='vmap': {reason}; use 'auto' or 'loop'")
            return self._side_by_side_or_loop(call)

    @property
    def settled(self) -> frozenset[str]:
        """Attributes that calls of the module change, and that are the same after each."""
        return frozenset(self._settled)

    def _side_by_side_or_loop(self, call: _Call) -> Any:
        before = StateBefore(self.module, pytree.tree_leaves(call.arguments)[0].device)
        strays = BatchedStrays() if self._looks_outside and not is_recording() else None
        try:
            with strays or contextlib.nullcontext():
                result = _side_by_side(call)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            if self._batching == "vmap" or is_users_own(error):
                raise
            reason = f"the model does not run under vmap: {error}{_hint(self.module)}"
        else:
            found = None
            if not is_recording():
                found = before.difference(lambda: _again(_side_by_side, call), self._settled, strays)
                self._looks_outside = False
            if found is None:
                return result
            reason = found
            del result
            if self._batching == "vmap":
                before.restore()
                raise RuntimeError(f"task_batching='vmap': {reason}; use 'auto' or 'loop'")
        before.restore()
        # Whatever else is wrong with the model or the loss shows itself again, as an error of its own.
        result = self._one_by_one(call)
        self._use_loop(reason)
        return result

    def _one_by_one(self, call: _Call) -> Any:
        """The loop over tasks. Its first call finds out whether the order of calls matters.

        Raises:
            OrderMattersError: it does.
        """
        if self._order_is_free or is_recording():
            return self._loop(call)
        leaves = pytree.tree_leaves(call.arguments)
        before = StateBefore(self.module, leaves[0].device)
        result = self._loop(call)
        if len(leaves[0]) > 1:
            if found := before.influence(result, lambda: _again(self._loop, call)):
                before.restore()
                raise OrderMattersError(found)
            self._order_is_free = True
        return result

    def _use_loop(self, reason: str) -> None:
        logger.warning("tasks run one after another, since %s", reason)
        self._batching = "loop"

    def _one(self, params: Params, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        with recomputed_with(self.module, params, self._names), placed(self.module, dict(params)):
            return self.module(*inputs, **options)

    def _loop(self, call: _Call) -> Any:
        # While recording, torch's own shape functions look at memory; an ordinary call before it knew about the model's.
        if self._in_own_memory or is_recording():
            return self._loop_over(call)
        before = StateBefore(self.module, pytree.tree_leaves(call.arguments)[0].device)
        try:
            with views_of_tasks():
                return self._loop_over(call)
        except OwnMemoryNeededError:
            before.restore()
            self._in_own_memory = True
        return self._loop_over(call)

    def _loop_over(self, call: _Call) -> Any:
        leaves, structure = pytree.tree_flatten(call.arguments)
        tasks = zip(*(self._tasks_of(leaf) for leaf in leaves), strict=True)
        written = self._written_weights()
        results = []
        if (lookups := current_lookups()) is not None:
            lookups.start()
        for number, task in enumerate(tasks):
            if lookups is not None:
                lookups.next_task()
            own, *others = pytree.tree_unflatten(list(task), structure)
            tables = {name: call.table(name, weight, number) for name, weight in written.items()}
            # The write would invalidate the graphs of the tasks before, and those of views.
            copies = {name: table.clone() for name, table in tables.items()}
            results.append(call.one({**own, **copies}, *others))
            for name, copy in copies.items():
                tables[name].data.copy_(copy.detach())
        return stacked(results)

    def _tasks_of(self, leaf: Tensor) -> Sequence[Tensor]:
        parts = leaf.unbind(0)
        return [part.clone() for part in parts] if self._in_own_memory else parts

    def _written_weights(self) -> Params:
        return {name.removeprefix(self._prefix): p for name, p in written_parameters(self.module).items()}

    def _write_reason(self, own: TaskParams) -> str | None:
        """Why tasks cannot run side by side where ``max_norm`` writes to a table that all tasks share; None if none does."""
        written = [name for name in self._written_weights() if name in own and own[name].stride(0) == 0]
        return f"its max_norm lets each call write to the parameter {written[0]}" if written else None

    def _hook_reason(self) -> str | None:
        if not torch.is_grad_enabled():
            return None
        for name, module in self.module.named_modules():
            if module._backward_hooks or module._backward_pre_hooks:
                return f"{name.removeprefix('model.') or 'the model'} has backward hooks, which vmap would never call"
        return None

    def _warn_of_hooks(self) -> None:
        if not self._warned_of_hooks and (reason := self._hook_reason()) is not None:
            self._warned_of_hooks = True
            logger.warning("task_batching='vmap': %s; 'auto' and 'loop' call them", reason)


def _again(function: Callable[[_Call], Any], call: _Call) -> Any:
    """``function(call)`` to see what a further call leaves on the model, so with all of its computations."""
    with anew(), repeating_lookups():
        return function(call)


@dataclass(frozen=True)
class _Call:
    """Arguments of a call, and what it computes for one task.

    Attributes:
        one: ``one(own, inputs, named)``.
        arguments: these, task dimension first.
        shared: parameters that are the same for all tasks.
    """

    one: Callable[..., Any]
    arguments: tuple[TaskParams, tuple[Any, ...], dict[str, Any]]
    shared: Params

    def table(self, name: str, weight: Tensor, task: int) -> Tensor:
        """What stands for the module's parameter ``weight`` in the call of a task."""
        own = self.arguments[0]
        return own[name][task] if name in own else self.shared.get(name, weight)


def _side_by_side(call: _Call) -> Any:
    """All tasks under vmap."""
    forms: list[Form] = []
    if (lookups := current_lookups()) is not None:
        lookups.start()
        lookups.next_task()

    def tensors(*arguments: Any) -> list[Tensor]:
        leaves, form = taken_apart(call.one(*arguments))
        forms.append(form)
        return leaves

    batched = vmap(tensors, randomness="different")(*call.arguments)
    return put_together(batched, forms[0])


def _hint(module: nn.Module) -> str:
    theirs = [part for part in module.modules() if type(part).__module__.startswith("transformers.")]
    ours = [getattr(getattr(part, "config", None), "_attn_implementation", None) == "metafast" for part in theirs]
    if theirs and not any(ours):
        return (
            "; metafast.integrations.huggingface.register() and attn_implementation='metafast' let models of transformers "
            "run under it"
        )
    return ""


class _Loss(nn.Module):
    """``loss_fn(model, batch)`` as a module, so that ``functional_call`` puts a task's parameters into the model itself."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.loss_fn(self.model, batch)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        if not isinstance(loss, Tensor) or not isinstance(metrics, dict):
            raise TypeError(
                "loss_fn: expected a scalar tensor, or that and a dict of metrics, got "
                + (
                    f"({type(loss).__name__}, {type(metrics).__name__})"
                    if isinstance(result, tuple)
                    else type(loss).__name__
                )
            )
        if loss.ndim != 0:
            raise ValueError(f"loss_fn: expected a scalar, the mean loss of one task, got shape {tuple(loss.shape)}")
        for name, metric in metrics.items():
            if not isinstance(metric, Tensor):
                raise TypeError(f"loss_fn: expected metrics that are tensors, got {type(metric).__name__} for {name!r}")
        return loss, metrics


class TaskLosses:
    """The loss of every task at its own parameters.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` gives the scalar mean loss of one task, or that and a dict of metrics.
        task_batching: as for :class:`TaskModel`.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, task_batching: str = "auto") -> None:
        self.model = model
        self._model = TaskModel(_Loss(model, loss_fn), task_batching, prefix="model.")

    @property
    def settled(self) -> frozenset[str]:
        """As for :class:`TaskModel`."""
        return self._model.settled

    def compute(self, own: TaskParams, shared: Params, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[T]`` and metrics ``[T, ...]`` at parameters ``[T, *shape]`` (own) and ``[*shape]`` (shared), by name."""
        losses, metrics = self._model.compute(own, shared, (batch,))
        return losses, metrics
