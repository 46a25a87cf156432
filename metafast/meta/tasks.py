"""Batches of tasks, and functions of all of them at once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from metafast.accelerate import accelerated_thread, replaced_names
from metafast.meta.model_checkpoint import recomputed_with
from metafast.meta.surroundings import Buffers

logger = logging.getLogger("metafast")

LossFn = Callable[[nn.Module, Any], Any]
Params = dict[str, Tensor]
TASK_BATCHING = ("auto", "vmap", "loop")


class PerStep:
    """A support set of its own for every inner step: ``meta(metafast.PerStep([batch_0, …, batch_K−1]), query)``.

    Args:
        batches: at least as many as there are inner steps, each as a support set is otherwise.

    Raises:
        ValueError: ``batches`` is empty.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches: expected one a step, got none")

    def __repr__(self) -> str:
        return f"PerStep({self.batches!r})"


# As a pytree, it is cut into chunks of tasks, converted and counted as any batch is.
pytree.register_pytree_node(
    PerStep,
    lambda steps: (steps.batches, None),
    lambda batches, _: PerStep(list(batches)),
    serialized_type_name="metafast.PerStep",
)


def support_at(support: Any, step: int) -> Any:
    """The support set of a step."""
    return support.batches[step] if isinstance(support, PerStep) else support


def check_support_steps(support: Any, steps: int) -> None:
    """Raises ValueError where ``support`` ends before the inner steps do."""
    if isinstance(support, PerStep) and len(support.batches) < steps:
        raise ValueError(f"support: expected PerStep of at least {steps} batches, got {len(support.batches)}")


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
        if isinstance(leaf, Mapping):
            raise TypeError(f"{name}: expected a dict of tensors, got a {type(leaf).__name__}; pass dict({name})")
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


def select_tasks(batch: Any, index: Tensor | slice) -> Any:
    """Some of the tasks of a batch."""
    return pytree.tree_map(lambda leaf: leaf[index], batch)


def micro_batches(batch: Any, count: int) -> list[tuple[float, Any]]:
    """The examples of every task (second dimension) in at most ``count`` parts, each with its share of them.

    Raises:
        ValueError: a tensor has no second dimension, or these differ.
    """
    leaves, structure = pytree.tree_flatten(batch)
    sizes = {leaf.shape[1] if leaf.ndim > 1 else 0 for leaf in leaves}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            "support: micro_batches cuts the second dimension of every tensor, the examples of a task; expected the same "
            f"in all, got shapes {', '.join(str(tuple(leaf.shape)) for leaf in leaves)}"
        )
    (examples,) = sizes
    parts = zip(*(leaf.tensor_split(min(count, examples), dim=1) for leaf in leaves), strict=True)
    return [(part[0].shape[1] / examples, pytree.tree_unflatten(list(part), structure)) for part in parts]


class TaskFunction:
    """A module's outputs for every task at once, with parameters of each task's own, inside :func:`metafast.accelerate`.

    Only the forward runs under ``vmap``. Derivatives are ordinary autograd on what it recorded, operations on whole task
    batches: tasks share nothing, so the gradient of summed outputs holds each task's own.

    Args:
        module: any module; a call of it gives a pytree of tensors.
        task_batching: ``"vmap"``, ``"loop"``, or ``"auto"``: vmap unless the module does not run under it.
        prefix: of the names by which parameters are given.
    """

    def __init__(self, module: nn.Module, task_batching: str = "auto", prefix: str = "") -> None:
        if task_batching not in TASK_BATCHING:
            raise ValueError(
                f"task_batching: expected one of {', '.join(map(repr, TASK_BATCHING))}, got {task_batching!r}"
            )
        self.module = module
        self._batching = task_batching
        self._prefix = prefix
        self._names = replaced_names(module)

    def __call__(
        self,
        own: Params,
        shared: Params,
        inputs: tuple[Any, ...],
        named: dict[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Outputs, task dimension first.

        Args:
            own: parameters (or buffers) ``[T, *shape]`` of each task.
            shared: parameters ``[*shape]`` that stand in for the module's, the same for all tasks.
            inputs, named: positional and keyword arguments, task dimension first.
            options: keyword arguments that are the same for all tasks.
        """

        def one(own: Params, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return self._one({**own, **shared}, inputs, {**named, **(options or {})})

        arguments = own, inputs, named or {}
        with accelerated_thread(self._names):
            if self._batching == "loop":
                return self._loop(one, arguments)
            buffers = Buffers(self.module)
            try:
                return vmap(one, randomness="different")(*arguments)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                if self._batching == "vmap":
                    raise
                buffers.restore()
                # Whatever else is wrong with the model or the loss shows itself again, as an error of its own.
                result = self._loop(one, arguments)
                logger.warning(
                    "tasks run one after another, since the model does not run under vmap: %s%s",
                    error,
                    _hint(self.module),
                )
                self._batching = "loop"
                return result

    def _one(self, params: Params, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        params = {self._prefix + name: value for name, value in params.items()}
        with recomputed_with(self.module, params, self._names):
            return functional_call(self.module, params, inputs, options)

    @staticmethod
    def _loop(one: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        leaves, structure = pytree.tree_flatten(arguments)
        tasks = zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
        results = [one(*pytree.tree_unflatten(list(task), structure)) for task in tasks]
        return pytree.tree_map(lambda *outputs: torch.stack(outputs), *results)


def _hint(module: nn.Module) -> str:
    if any(type(part).__module__.startswith("transformers.") for part in module.modules()):
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
        return loss, metrics


class TaskLosses:
    """The loss of every task at parameters of its own.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` gives the scalar mean loss of one task, or that and a dict of metrics.
        task_batching: as for :class:`TaskFunction`.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, task_batching: str = "auto") -> None:
        self.model = model
        self._function = TaskFunction(_Loss(model, loss_fn), task_batching, prefix="model.")

    def __call__(self, own: Params, shared: Params, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[T]`` and metrics ``[T, ...]`` at parameters ``[T, *shape]``, and ``[*shape]`` for all, by name."""
        losses, metrics = self._function(own, shared, (batch,))
        return losses, metrics


class Learners:
    """The adapted models of a batch of tasks; ``learners(inputs)`` runs every task's on its own inputs, and
    ``learners.model(task)`` is one of them as a module, to be saved or to generate text with.

    Attributes:
        params: adapted parameters by name, ``[T, *shape]``, without a graph. All else is the model's own, not a copy.
    """

    def __init__(self, function: TaskFunction, params: Params, shared: Params) -> None:
        self.params = params
        self._function = function
        self._shared = shared

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Outputs of every task's model, task dimension first; so are the inputs.

        Args:
            inputs, options: arguments of the model. Keyword arguments are the tasks' own if they are tensors, or hold
                tensors alone; without one, such as ``use_cache=False``, they are the same for all tasks.
        """
        named = {
            name: value
            for name, value in options.items()
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
        }
        given = {"inputs": inputs, **named} if inputs or not named else named
        counts = {name: count_tasks(value, name) for name, value in given.items()}
        expected = next(iter(self.params.values())).shape[0] if self.params else next(iter(counts.values()))
        for name, tasks in counts.items():
            if tasks != expected:
                raise ValueError(f"{name}: expected {expected} tasks, as many as were adapted to, got {tasks}")
        same = {name: value for name, value in options.items() if name not in named}
        return self._function(self.params, self._shared, inputs, named, same)

    def model(self, task: int) -> nn.Module:
        """A copy of the model with the parameters of one task.

        Raises:
            ValueError: the algorithm's learners have state besides the model's parameters (prototypes, a head of their own).
            IndexError: there is no such task.
        """
        module = copy.deepcopy(self._function.module)
        params = dict(module.named_parameters())
        if missing := sorted(set(self.params) - set(params)):
            raise ValueError(
                f"model: the learners have {', '.join(missing)} beside the model's parameters; call them instead"
            )
        with torch.no_grad():
            for name, values in self.params.items():
                params[name].copy_(values[task])
        return module
