"""The adapted models of a batch of tasks."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.engine.inference_mode import outside_inference_mode, usable
from metafast.engine.module_attributes import tensors_in
from metafast.engine.task_batch import Params, count_tasks
from metafast.engine.task_model import TaskModel


class Learners:
    """The adapted models of a batch of tasks.

    ``learners(inputs)`` runs every task's model on its own inputs. ``learners.model(task)`` is one of them as a module, to
    be saved or to generate text with.

    Attributes:
        params: adapted parameters by name, ``[T, *shape]``, without a graph. All else is the model's own and no copy.
    """

    def __init__(self, function: TaskModel, params: Params, shared: Params) -> None:
        self.params = params
        self._function = function
        self._shared = shared

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
        expected = next(iter(self.params.values())).shape[0] if self.params else next(iter(counts.values()))
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
        return self._function.compute(self.params, self._shared, inputs, named, same)

    def model(self, task: int) -> nn.Module:
        """A copy of the model with the parameters of one task.

        Args:
            task: number of the task, from 0.

        Raises:
            ValueError: the algorithm keeps more per task than the model's parameters (prototypes, a head).
            IndexError: there is no such task.
        """
        with outside_inference_mode():
            return self._copy(task)

    def _copy(self, task: int) -> nn.Module:
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
