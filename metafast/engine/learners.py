"""The adapted models of a batch of tasks."""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.engine.embedding_rows import Rows, TaskParams
from metafast.engine.inference_mode import outside_inference_mode, usable
from metafast.engine.module_attributes import tensors_in
from metafast.engine.sharded_parameters import Whole, refuse_sharded
from metafast.engine.task_batch import Params, count_tasks
from metafast.engine.task_model import TaskLosses, TaskModel


class Learners:
    """The adapted models of a batch of tasks.

    ``learners(inputs)`` runs every task's model on its own inputs. ``learners.model(task)`` is one of them as a module, to
    be saved or to generate text with.

    All that is not adapted is the model's own and no copy.

    Args:
        function: outputs of all tasks.
        params: adapted parameters, or rows of them.
        shared: parameters that stand in for the model's, the same for all tasks.
        sharded: what made them, where its parameters are sharded.
    """

    def __init__(
        self, function: TaskModel, params: TaskParams, shared: Params, sharded: nn.Module | None = None
    ) -> None:
        self._params = params
        self._function = function
        self._shared = shared
        self._sharded = sharded

    @property
    def params(self) -> Params:
        """Adapted parameters by name, ``[T, *shape]``, without a graph.

        Of large embeddings the learners hold the rows that were adapted; asked for this, every task's whole table.
        """
        for name, p in self._params.items():
            if isinstance(p, Rows):
                self._params[name] = p.tables(self._shared[name])
        return cast(Params, self._params)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Outputs of every task's model, with the task as first dimension.

        Args:
            inputs: positional arguments of the model, with the task as first dimension.
            options: keyword arguments of the model. Tensors, and containers of tensors alone, have the task as first
                dimension. Others, such as ``output_attentions=True``, are the same for all tasks. ``use_cache`` of Hugging
                Face's models is False by default: a cache of keys and values has no task dimension.

        Raises:
            TypeError, ValueError: an argument is not as described, or outputs hold tensors in something that is no pytree.
        """
        with outside_inference_mode():
            return self._compute(usable(inputs), usable(options))

    def _compute(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        named = {
            name: value
            for name, value in options.items()
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
        }
        given = {"inputs": inputs, **named} if inputs or not named else named
        counts = {name: count_tasks(value, name) for name, value in given.items()}
        adapted = pytree.tree_leaves(self._params)
        expected = adapted[0].shape[0] if adapted else next(iter(counts.values()))
        for name, tasks in counts.items():
            if tasks != expected:
                raise ValueError(f"{name}: expected {expected} tasks, as many as were adapted to, got {tasks}")
        same = {name: value for name, value in options.items() if name not in named}
        for name, value in same.items():
            if next(tensors_in(value), None) is not None:
                raise TypeError(
                    f"{name}: expected tensors of each task's own, or something without tensors, got a "
                    f"{type(value).__name__}, which all tasks would write to; call learners.model(task)"
                )
        if _takes(self._function.module, "use_cache"):
            same.setdefault("use_cache", False)
        if self._sharded is not None:
            whole = Whole(self._sharded)
            # A graph would need the parameters whole after the call.
            with torch.no_grad(), whole.placed(), whole.gathered():
                return whole.own(self._function.compute(self._params, self._shared, inputs, named, same))
        return self._function.compute(self._params, self._shared, inputs, named, same)

    def losses(self, task_losses: TaskLosses, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metrics of every task's model, without a graph.

        Args:
            task_losses: the ``task_losses`` of the learner that adapted them.
            batch: pytree of tensors with as many tasks as were adapted to.

        Returns:
            losses ``[T]`` and metrics ``[T, …]`` by name, as ``loss_fn`` gives them.

        Raises:
            ValueError: the model is sharded.
        """
        if self._sharded is not None:
            refuse_sharded(self._function.module, "losses", "compute them from the outputs of a call")
        with outside_inference_mode(), torch.no_grad():
            return task_losses.compute(self._params, self._shared, usable(batch))

    def model(self, task: int) -> nn.Module:
        """A copy of the model with the parameters of one task.

        Args:
            task: number of the task, from 0.

        Raises:
            ValueError: the algorithm keeps more per task than the model's parameters (prototypes, a head), or the model is
                sharded.
            IndexError: there is no such task.
        """
        refuse_sharded(
            self._function.module, "model", "call the learners, or load params and a state_dict into a model"
        )
        with outside_inference_mode():
            return self._copy(task)

    def _copy(self, task: int) -> nn.Module:
        module = copy.deepcopy(self._function.module)
        params = dict(module.named_parameters())
        if missing := sorted(set(self._params) - set(params)):
            raise ValueError(
                f"model: the learners have {', '.join(missing)} beside the model's parameters; call them instead"
            )
        with torch.no_grad():
            for name, values in self._params.items():
                if isinstance(values, Rows):
                    of_task = Rows(*(part[task : task + 1] for part in values))
                    params[name].copy_(of_task.tables(self._shared[name])[0])
                else:
                    params[name].copy_(values[task])
        return module


def _takes(module: nn.Module, option: str) -> bool:
    """Whether calls of the module take a keyword argument of this name.

    Models of ``peft`` name few arguments, and hand all others to the model inside, which ``get_base_model`` gives.
    """
    parameters = inspect.signature(module.forward).parameters
    if option in parameters:
        return True
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    inside = getattr(module, "get_base_model", None)
    return hands_on and callable(inside) and option in inspect.signature(inside().forward).parameters
