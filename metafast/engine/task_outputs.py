"""Outputs of a model for one task, and the outputs of all tasks put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metafast.engine.module_attributes import tensors_in


class Form(NamedTuple):
    """A pytree without its tensors.

    Attributes:
        structure: structure of all leaves.
        others: the leaves, None in the place of a tensor.
        tensors: for each leaf, whether it is a tensor.
    """

    structure: pytree.TreeSpec
    others: list[Any]
    tensors: list[bool]


def taken_apart(result: Any) -> tuple[list[Tensor], Form]:
    """The tensors of a pytree, and the pytree without them.

    Raises:
        TypeError: another leaf holds tensors, as a cache of keys and values does.
    """
    leaves, structure = pytree.tree_flatten(result)
    tensors = [isinstance(leaf, Tensor) for leaf in leaves]
    for leaf, is_tensor in zip(leaves, tensors, strict=True):
        if not is_tensor and next(tensors_in(leaf), None) is not None:
            raise TypeError(
                f"outputs: expected a pytree of tensors, got a {type(leaf).__name__} with tensors in it, which has no task "
                "dimension; switch it off (use_cache=False), or call learners.model(task)"
            )
    others = [None if is_tensor else leaf for leaf, is_tensor in zip(leaves, tensors, strict=True)]
    return [leaf for leaf, is_tensor in zip(leaves, tensors, strict=True) if is_tensor], Form(
        structure, others, tensors
    )


def put_together(tensors: Sequence[Tensor], form: Form) -> Any:
    """The pytree with these tensors."""
    given = iter(tensors)
    leaves = [next(given) if is_tensor else other for other, is_tensor in zip(form.others, form.tensors, strict=True)]
    return pytree.tree_unflatten(leaves, form.structure)


def stacked(results: Sequence[Any]) -> Any:
    """The results of all tasks as one pytree, task dimension first. Other leaves are those of the first task.

    Raises:
        TypeError, ValueError: the results differ in structure, in shapes, or in leaves that are no tensors.
    """
    parts, forms = zip(*map(taken_apart, results), strict=True)
    for task, (tensors, form) in enumerate(zip(parts, forms, strict=True)):
        if form.structure != forms[0].structure or form.tensors != forms[0].tensors or form.others != forms[0].others:
            raise ValueError(
                f"outputs: expected the same for every task but for tensors' values, got {_shown(form)} for task {task} "
                f"and {_shown(forms[0])} for task 0"
            )
        for tensor, first in zip(tensors, parts[0], strict=True):
            if tensor.shape != first.shape:
                raise ValueError(
                    f"outputs: expected the same shapes for every task, got {tuple(tensor.shape)} for task {task} and "
                    f"{tuple(first.shape)} for task 0; pad them, or call learners.model(task)"
                )
    return put_together([torch.stack(tensors) for tensors in zip(*parts, strict=True)], forms[0])


def _shown(form: Form) -> str:
    return repr(
        pytree.tree_unflatten([... if t else o for o, t in zip(form.others, form.tensors, strict=True)], form.structure)
    )
