"""What stands in for torch's functions; README.md says what is wrong with their batching rules.

Each takes torch's arguments and returns NotImplemented for those that torch's rule is right for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from metafast.ops.batching.own_memory import as_strided
from metafast.ops.torch_internals import are_transforms_active

Function = Callable[..., Any]


def under_transforms(function: Function) -> Function:
    """``function`` where a transform is active, and NotImplemented elsewhere."""

    def standing_in(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if are_transforms_active() else NotImplemented

    return standing_in


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Any:
    if not -input.ndim <= dim < input.ndim or not -input.shape[dim] <= index < input.shape[dim]:
        return NotImplemented
    index %= input.shape[dim]
    return torch.slice_scatter(input, src.unsqueeze(dim % input.ndim), dim, index, index + 1)


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim or not isinstance(dim, int):
        return NotImplemented
    if input.ndim == 0:
        return _index_fill(input.reshape(1), 0, index, value).reshape(())
    size = input.shape[dim]
    # Torch's own error for an index that is out of bounds; with a number its rule is right.
    torch.index_fill(input.detach(), dim, index, 0)
    named = (index.reshape(-1, 1) == torch.arange(size, device=input.device)).any(0)
    return torch.where(named.reshape(size, *(1,) * (input.ndim - 1 - dim % input.ndim)), value.to(input.dtype), input)


def _index_fill_(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    filled = _index_fill(input, *args, **kwargs)
    return filled if filled is NotImplemented else input.copy_(filled)


def _max(input: Tensor, *others: Any, **options: Any) -> Any:
    return NotImplemented if others or options or not input.is_floating_point() else torch.amax(input, _dims(input))


def _min(input: Tensor, *others: Any, **options: Any) -> Any:
    return NotImplemented if others or options or not input.is_floating_point() else torch.amin(input, _dims(input))


def _dims(input: Tensor) -> tuple[int, ...]:
    return tuple(range(input.ndim))


def _middle(function: Function) -> Function:
    def middle(input: Tensor, *others: Any, **options: Any) -> Any:
        if others or options or not input.is_floating_point():
            return NotImplemented
        value = function(input.detach())
        equals = (input == value) | (input.isnan() & value.isnan())
        # The value itself, with the derivative of the mean of its equals: their differences to it are 0.
        kept = torch.where(equals, input, 0.0)
        return value + torch.where(equals, kept - kept.detach(), 0.0).sum() / equals.sum()

    return middle


def _clamp(input: Tensor, min: Any = None, max: Any = None, **options: Any) -> Any:
    if not isinstance(min, Tensor) or not isinstance(max, Tensor) or options:
        return NotImplemented
    # Between equal bounds torch gives no bound the gradient.
    lower = torch.where(min < max, min, min.detach())
    return torch.where((input > max) | (max < min), max, torch.where(input < min, lower, input))


def _of_scalars(input: Tensor, *_: Any, **options: Any) -> Any:
    return input.clone() if input.ndim == 0 and not options.keys() - {"dim", "shifts", "dims"} else NotImplemented


def _addr(input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    if beta != 0 or out is not None:
        return NotImplemented
    return alpha * torch.outer(vec1, vec2).to(torch.promote_types(input.dtype, vec1.dtype))


def _in_place(function: Function) -> Function:
    def in_place(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Of a copy: autograd keeps what the function was given.
        return input.copy_(function(input.clone(), *args, **kwargs))

    return in_place


def _refused(name: str) -> Function:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{name} does not run under vmap as it does for one task")

    return refused


def _addbmm_(input: Tensor, batch1: Tensor, batch2: Tensor, **_: Any) -> Any:
    if input.shape == (batch1.shape[1], batch2.shape[2]):
        return NotImplemented
    return _refused("addbmm_ into a tensor of another shape")()


def _linear_cross_entropy(*_: Any, options: Any = None, **__: Any) -> Any:
    # In chunks it computes its gradient where it sees that one is required, and under vmap it does not see it.
    return NotImplemented if options is None else _refused("linear_cross_entropy with options")()


_SHARED: dict[str, Function] = {
    "select_scatter": _select_scatter,
    "index_fill": _index_fill,
    "max": _max,
    "min": _min,
    "median": _middle(torch.median),
    "nanmedian": _middle(torch.nanmedian),
    "clamp": _clamp,
    "clip": _clamp,
    "roll": _of_scalars,
    "logcumsumexp": _of_scalars,
    "addr": _addr,
}
_IN_PLACE = {
    name + "_": _in_place(getattr(torch.Tensor, name))
    for name in ("cumprod", "pow", "float_power", "hypot", "index_reduce")
}

# Of torch and its modules, by function; of tensors, by name.
FUNCTIONS: dict[Function, Function] = {
    **{getattr(torch, name): under_transforms(function) for name, function in _SHARED.items()},
    torch.as_strided: as_strided,
    **(
        {torch.nn.functional.linear_cross_entropy: under_transforms(_linear_cross_entropy)}
        # Since torch 2.13.
        if hasattr(torch.nn.functional, "linear_cross_entropy")
        else {}
    ),
}
METHODS: dict[str, Function] = {
    **{name: under_transforms(function) for name, function in {**_SHARED, **_IN_PLACE}.items()},
    "__ipow__": under_transforms(_IN_PLACE["pow_"]),
    "index_fill_": under_transforms(_index_fill_),
    "addbmm_": under_transforms(_addbmm_),
    "as_strided_": under_transforms(_refused("as_strided_")),
    "as_strided": as_strided,
}
