"""Building a program: tensors in one block of memory, and the calls that read and write them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metafast.program.aliases import Root, aliased_argument, reshapes_in_place
from metafast.program.arena import block
from metafast.program.graph import CALL, INPUT, TENSOR, Form, Node, leaves, mapped
from metafast.program.out_overloads import writing
from metafast.program.plan import Plan

Call = Callable[[], object]


class Built:
    """Memory and calls for a recording.

    Args:
        plan: plan of the recording.
        device: device of the computation.
        given: for each input, a tensor that calls read where it is; None for one that gets memory of its own.

    Attributes:
        inputs, outputs: tensors that calls read and write; an output may be something else than a tensor.
        in_place: for each input, whether it is the given tensor. One that a call changes is not.
        calls: the calls, in the order in which they are made.
        writes: for each input, whether a call changes it.
        constant: for each output, whether no call makes it.
    """

    def __init__(self, plan: Plan, device: torch.device, given: Sequence[Tensor | None]) -> None:
        self._plan = plan
        self._values: dict[Node, Any] = {}
        self._memory = block(plan.bytes, device)
        self.inputs: list[Tensor] = []
        self.in_place: list[bool] = []
        self.writes: list[bool] = []
        self.calls: list[Call] = []
        self.outputs: list[Any] = []
        self.constant: list[bool] = []
        for node in plan.nodes:
            if node.kind == INPUT:
                recorded, there = node.value, given[len(self.inputs)]
                self.writes.append(Root(node, 0) in self._plan.aliases.written)
                self.in_place.append(there is not None and not self.writes[-1])
                if there is None or self.writes[-1]:
                    there = torch.empty(recorded.shape, dtype=recorded.dtype, device=recorded.device)
                self.inputs.append(there)
                self._values[node] = there
            elif node.kind == TENSOR:
                self._values[node] = node.target
            elif node.kind == CALL:
                self._values[node] = self._call(node)
            else:
                (leaves,) = node.args
                self.outputs = self._now(leaves)
                self.constant = [
                    isinstance(leaf, Node) and all(root in self._plan.constant for root in self._plan.aliases.of(leaf))
                    for leaf in leaves
                ]

    def _call(self, node: Node) -> Any:
        """Notes a node's call down, or makes it where it is made only once, and returns the node's value."""
        target: Any = node.target
        args, kwargs = self._now(self._moved(node)), self._now(node.kwargs)
        if reshapes_in_place(node):
            # The argument's other uses, before, are of its shape then.
            return target(torch.ops.aten.alias(args[0]), *args[1:], **kwargs)
        if node in self._plan.stacks:
            return self._stacked(node)
        if node not in self._plan.running:
            return target(*args, **kwargs)
        base = aliased_argument(node)
        if base is not None or next(leaves(Form, node.value), None) is None:
            self.calls.append(functools.partial(target, *args, **kwargs))
            return None if base is None else self._values[base]
        outputs = (
            [self._values[self._plan.overwritten[node]]]
            if node in self._plan.overwritten
            else [
                self._place(root, like)
                for root, like in zip(self._plan.aliases.of(node), leaves(Form, node.value), strict=True)
            ]
        )
        given = iter(outputs)
        value = mapped(Form, lambda _: next(given), node.value)
        self.calls.append(writing(target, args, kwargs, value))
        return value

    def _moved(self, node: Node) -> tuple[Any, ...]:
        """The node's arguments; an offset from the beginning of recorded memory becomes one from its place in the block."""
        position = _OFFSETS.get(node.target)
        if position is None or len(node.args) <= position or node.args[position] is None:
            return node.args
        base: Any = node.args[0]
        (recorded,) = leaves(Form, base.value)
        args: list[Any] = list(node.args)
        args[position] += self._values[base].storage_offset() - recorded.offset
        return tuple(args)

    def _stacked(self, stack: Node) -> Tensor:
        """The tensor of a stack, in which its parts are made."""
        if stack not in self._values:
            (root,) = self._plan.aliases.of(stack)
            self._values[stack] = self._place(root, stack.value)
        return self._values[stack]

    def _place(self, root: Root, like: Form) -> Tensor:
        if root in self._plan.parts:
            return self._plan.parts[root].within(self._stacked(self._plan.parts[root].stack))
        tensor = torch.empty(0, dtype=like.dtype, device=like.device)
        return tensor.set_(self._memory, self._plan.places[root] // like.dtype.itemsize, like.shape, like.strides)

    def _now(self, arguments: Any) -> Any:
        return mapped(Node, self._values.__getitem__, arguments)


# The position of the argument that is an offset into memory.
_OFFSETS: dict[Any, int] = {
    torch.ops.aten.as_strided.default: 3,
    torch.ops.aten.as_strided_copy.default: 3,
    torch.ops.aten.as_strided_scatter.default: 4,
}
