"""The operations that a function runs, in order, and the forms of the tensors that they give."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from metafast.program.errors import NotRecordableError

Leaf = TypeVar("Leaf")

# The kinds of nodes.
INPUT = "input"
TENSOR = "tensor"
CALL = "call"
OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Form:
    """All of a tensor but its data."""

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    is_conj: bool
    is_neg: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """The form of a strided tensor.

        Raises:
            NotRecordableError: it is a sparse one, for example.
        """
        if tensor.layout is not torch.strided:
            raise NotRecordableError(f"the computation has a tensor of layout {tensor.layout}, which no program holds")
        return cls(
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.device,
            tensor.is_conj(),
            tensor.is_neg(),
        )

    @property
    def bytes(self) -> int:
        """From its first element to the end of its last."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (1 + last) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether elements lie one after another, in the order of the dimensions."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return 0 in self.shape
            expected *= n
        return True

    def permuted(self, order: list[int]) -> Form:
        """The form with its dimensions in another order."""
        shape, strides = (torch.Size(part[dim] for dim in order) for part in (self.shape, self.strides))
        return Form(shape, tuple(strides), self.offset, self.dtype, self.device, self.is_conj, self.is_neg)


class Node:
    """An operation, an input, a tensor that was reached otherwise, or the results of all.

    Attributes:
        kind: one of the kinds above.
        target: of a call, the operation, or ``operator.getitem`` for a part of what another call gives; of a tensor that was
            reached otherwise, the tensor.
        args, kwargs: of a call; of the output, the results. Nodes stand for tensors.
        value: the form of the tensor that it gives, or lists and tuples of these; None for what is no tensor.
        sources: the nodes in its arguments, each once.
    """

    __slots__ = ("args", "kind", "kwargs", "sources", "target", "value")

    def __init__(
        self, kind: str, target: Any = None, args: Any = (), kwargs: dict[str, Any] | None = None, value: Any = None
    ) -> None:
        self.kind = kind
        self.become(target, args, kwargs or {}, value)

    def become(self, target: Any, args: Any, kwargs: dict[str, Any], value: Any) -> None:
        """Makes this node, which others read, another one of its kind."""
        self.target = target
        self.args = args
        self.kwargs = kwargs
        self.value = value
        self.sources: tuple[Node, ...] = tuple(dict.fromkeys(leaves(Node, (args, kwargs))))


def part(of: Node, index: int) -> Node:
    """The node for a part of what a call gives."""
    return Node(CALL, operator.getitem, (of, index), value=of.value[index])


def leaves(kind: type[Leaf], value: Any) -> Iterator[Leaf]:
    """The objects of a kind in lists, tuples and dicts."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from leaves(kind, inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from leaves(kind, inner)


def mapped(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """A copy of lists, tuples and dicts with another object for every one of a kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        inner = [mapped(kind, function, part) for part in value]
        return inner if isinstance(value, list) else tuple(inner)
    if isinstance(value, dict):
        return {key: mapped(kind, function, part) for key, part in value.items()}
    return value
