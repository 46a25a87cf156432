"""What stands in for an embedding's weight while the inner loop adapts rows of it, and which embeddings allow that.

The model computes with a :class:`_Table` in the place of the weight. Only ``torch.nn.functional.embedding`` can read it.
Where a model reads its weight otherwise, ``WholeTableError`` says so, and the weight is adapted as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metafast.engine.embedding_rows import Lookups, Rows, WholeTableError, current_lookups
from metafast.inner import SGD, Adam, AdamW, RMSprop, Rule
from metafast.ops import torch_internals
from metafast.ops.layers.embedding import embedding

# Smaller tables are adapted as a whole: nothing would be gained.
LEAST_ROWS = 1024


class _Table(Tensor):
    """What stands in for the weight of an embedding in the model of a task."""

    _name: str
    _weight: Tensor
    _rows: Rows
    _lookups: Lookups | None

    @staticmethod
    def __new__(cls, name: str, weight: Tensor, rows: Rows) -> _Table:
        """Args: name of the weight; the weight ``[V, D]`` of all tasks; the adapted rows of one."""
        table: _Table = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=weight.requires_grad
        )
        table._name, table._weight, table._rows, table._lookups = name, weight, rows, current_lookups()
        return table

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return _looked_up(*args, **kwargs)
        if func in torch_internals.QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        # Functions that stand in for torch's have a name like theirs.
        raise _read_otherwise(args, kwargs, name if name.startswith("__") else name.removeprefix("_"))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _read_otherwise(args, kwargs or {}, str(func))


def _read_otherwise(args: Any, kwargs: Any, function: str) -> WholeTableError:
    table = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, _Table))
    return WholeTableError(
        table._name, f"the model reads it by {function}, and not by torch.nn.functional.embedding alone"
    )


def _looked_up(
    input: Tensor,
    table: _Table,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``torch.nn.functional.embedding`` of a table."""
    name, weight, rows, lookups = table._name, table._weight, table._rows, table._lookups
    if max_norm is not None or scale_grad_by_freq:
        raise WholeTableError(name, "max_norm and scale_grad_by_freq look at the whole table")
    # Positions are the same for all tasks, and their rows are not.
    ids = input.flatten().long() + 0 * rows.ids.sum()
    if lookups is None or not torch.is_grad_enabled():
        values = rows.of(weight, ids)
    else:
        values = _taken_down(name, weight, rows, lookups, ids)
    if padding_idx is not None:
        row = padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx
        values = torch.where((ids == row).unsqueeze(-1), values.detach(), values)
    return values.view(*input.shape, weight.shape[1])


def _taken_down(name: str, weight: Tensor, rows: Rows, lookups: Lookups, ids: Tensor) -> Tensor:
    level = torch_internals.level_of(rows.ids)
    if torch_internals.level_of(ids) != level:
        raise WholeTableError(name, "the model looks rows up inside of a transform of its own")
    if not lookups.growing:
        if rows.ids.shape[0] == 0:
            lookups.check(name, torch.ones_like(ids, dtype=torch.bool).any(), level)
            return rows.of(weight, ids)
        place, known = rows.places(ids)
        lookups.check(name, (~known).any(), level)
        return embedding(rows.values, place)
    if rows.ids.shape[0] + ids.shape[0] > weight.shape[0]:
        raise WholeTableError(name, "a support set has more positions than it has rows")
    own = ids.sort().values
    values = rows.of(weight, own)
    lookups.add(name, own, values, level)
    return embedding(values, torch.searchsorted(own, ids))


def with_tables(own: Mapping[str, Tensor | Rows], shared: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors to be placed in a task's model.

    Args:
        own: the task's parameters, or rows of them.
        shared: parameters that are the same for all tasks; those too of which the task has rows.
        prefix: put before all names.
    """
    tensors = dict(shared)
    for name, value in own.items():
        tensors[name] = _Table(name, shared[name], value) if isinstance(value, Rows) else value
    return {prefix + name: tensor for name, tensor in tensors.items()}


def tables_by_rows(model: nn.Module, adapted: Mapping[str, Tensor], rule: Rule) -> frozenset[str]:
    """The parameters of which an inner loop with this rule may adapt rows, by their names among ``adapted``."""
    if not _moves_by_gradient_alone(rule) or any(type(m).__name__ == "OptimizedModule" for m in model.modules()):
        return frozenset()
    tables, others = set[int](), set[int]()
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                fits = key == "weight" and isinstance(module, nn.Embedding) and _fits(module, p)
                (tables if fits else others).add(id(p))
    return frozenset(name for name, p in adapted.items() if id(p) in tables - others)


def _fits(module: nn.Embedding, weight: Tensor) -> bool:
    return (
        not is_traceable_wrapper_subclass(weight)
        and weight.shape[0] >= LEAST_ROWS
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )


def _moves_by_gradient_alone(rule: Rule) -> bool:
    """Whether a parameter stays where it is as long as its gradients are 0."""
    rates = rule.learned
    return (
        type(rule) in (SGD, Adam, AdamW, RMSprop)
        and getattr(rule, "weight_decay", 0.0) == 0
        and "weight_decay" not in rates
        and not any(granularity.startswith("parameter") for granularity in rates.values())
        and (isinstance(rule, SGD) or rule.eps > 0)  # type: ignore[attr-defined]
    )
