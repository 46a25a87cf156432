"""Batches of tasks, and the losses of all of them at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from metafast.accelerate import accelerated_thread, replaced_names

logger = logging.getLogger("metafast")

LossFn = Callable[[nn.Module, Any], Any]
Params = dict[str, Tensor]
TASK_BATCHING = ("auto", "vmap", "loop")


def count_tasks(batch: Any, name: str) -> int:
    """The number of tasks of a batch: the common first dimension of every tensor in it.

    Raises:
        TypeError: a leaf of ``batch`` is not a tensor, or there is none.
        ValueError: the first dimensions differ, or there is no task.
    """
    leaves = pytree.tree_leaves(batch)
    if not leaves:
        raise TypeError(
            f"{name}: expected tensors whose first dimension is the task, got {type(batch).__name__} without any"
        )
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}: expected tensors whose first dimension is the task, got a {type(leaf).__name__}")
        if leaf.ndim == 0:
            raise ValueError(f"{name}: expected tensors whose first dimension is the task, got a scalar tensor")
    counts = {leaf.shape[0] for leaf in leaves}
    if len(counts) > 1:
        raise ValueError(f"{name}: expected the same number of tasks in every tensor, got {sorted(counts)}")
    (tasks,) = counts
    if tasks == 0:
        raise ValueError(f"{name}: expected at least one task, got an empty task batch")
    return tasks


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
        return loss, metrics


class TaskLosses:
    """The loss of every task at parameters of its own, with the model inside :func:`metafast.accelerate`.

    Only the forward runs under ``vmap``. Derivatives are ordinary autograd on what it recorded, operations on whole task
    batches: tasks share nothing, so the gradient of the summed losses holds each task's own.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` gives the scalar mean loss of one task, or that and a dict of metrics.
        task_batching: ``"vmap"``, ``"loop"``, or ``"auto"``: vmap unless the model does not run under it.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, task_batching: str = "auto") -> None:
        if task_batching not in TASK_BATCHING:
            raise ValueError(
                f"task_batching: expected one of {', '.join(map(repr, TASK_BATCHING))}, got {task_batching!r}"
            )
        self._loss = _Loss(model, loss_fn)
        self._batching = task_batching
        self._names = replaced_names(model)

    def __call__(self, params: Params, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[T]`` and metrics ``[T, ...]`` at parameters ``[T, *shape]`` of the model's names."""
        with accelerated_thread(self._names):
            return self._batched(params, batch)

    def _batched(self, params: Params, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self._batching == "loop":
            return self._loop(params, batch)
        try:
            return vmap(self._one, randomness="different")(params, batch)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            if self._batching == "vmap":
                raise
            # Whatever else is wrong with the model or the loss shows itself again, as an error of its own.
            result = self._loop(params, batch)
            logger.warning("tasks run one after another, since the model does not run under vmap: %s", error)
            self._batching = "loop"
            return result

    def _one(self, params: Params, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return functional_call(self._loss, {f"model.{name}": value for name, value in params.items()}, (batch,))

    def _loop(self, params: Params, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        leaves, structure = pytree.tree_flatten((params, batch))
        results = [
            self._one(*pytree.tree_unflatten(task, structure))
            for task in zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
        ]
        losses = torch.stack([loss for loss, _ in results])
        return losses, {name: torch.stack([metrics[name] for _, metrics in results]) for name in results[0][1]}


class Learners:
    """The adapted models of a batch of tasks; ``learners(inputs)`` runs every task's on its own inputs.

    Attributes:
        params: adapted parameters by name, ``[T, *shape]``, without a graph.
    """

    def __init__(self, model: nn.Module, params: Params) -> None:
        self.params = params
        self._model = model

    def __call__(self, *inputs: Any) -> Any:
        """Outputs of every task's model, task dimension first; so are the inputs."""
        tasks = count_tasks(inputs, "inputs")
        expected = next(iter(self.params.values())).shape[0] if self.params else tasks
        if tasks != expected:
            raise ValueError(f"inputs: expected {expected} tasks, as many as were adapted to, got {tasks}")
        with accelerated_thread(replaced_names(self._model)):
            return vmap(lambda params, args: functional_call(self._model, params, args), randomness="different")(
                self.params, inputs
            )
