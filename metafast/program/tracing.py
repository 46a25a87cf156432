"""Noting operations down while a function runs on tensors without data."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from metafast.program.errors import NotRecordableError
from metafast.program.graph import CALL, INPUT, TENSOR, Form, Node, leaves, mapped, part
from metafast.program.known_results import KnownResults

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
LOOKS = "the computation depends on the values of tensors in Python, which a replay would not look at again:"
DRAWS_ELSEWHERE = "the computation draws from a generator of its own, which a replay would not seed again"


class Tracing(TorchDispatchMode):
    """While it is entered, every operation below autograd and vmap becomes a node.

    Args:
        mode: makes the tensors without data.

    Attributes:
        nodes: inputs, tensors that were reached otherwise, and calls, in order.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self._mode = mode
        self._results = KnownResults(mode)
        # Tensors with data, held by their nodes.
        self._reached: dict[int, Node] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap the method below in two more calls.
        return False

    def input(self, tensor: Tensor) -> Tensor:
        """Makes a tensor without data an input, and returns it."""
        self._note(tensor, self._appended(Node(INPUT, value=Form.of(tensor))))
        return tensor

    def nodes_of(self, value: Any) -> Any:
        """Lists, tuples and dicts with nodes for tensors."""
        return mapped(Tensor, self._node, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # C++ asks for the device of every tensor without data that it meets, three times as often as it computes.
        if func is _DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        if any(kind is not FakeTensor for kind in types):
            # A subclass says itself what it computes.
            return NotImplemented
        if func is _aten._local_scalar_dense.default and not isinstance(args[0], FakeTensor):
            # It may have another value at a replay.
            raise NotRecordableError(f"{LOOKS} {func}; so does a tensor without dimensions as an index")
        if _has_composite_kernel(func) and _is_decomposed(func, _device((args, kwargs))):
            with self:
                return func.decompose(*args, **kwargs)
        if func is _aten.lift_fresh.default:
            # It takes what torch.tensor made for new, which it is at the first call alone.
            func = _aten.lift_fresh_copy.default
        nodes, named = self.nodes_of(args), self.nodes_of(kwargs)
        result, value = self._results.of(func, args, kwargs)
        if func._schema.returns and not func._schema.is_mutable and not any(True for _ in leaves(Form, value)):
            # Python gets a number that forms decide.
            return result
        self._note(result, self._appended(Node(CALL, func, nodes, named, value)))
        return result

    def _appended(self, node: Node) -> Node:
        self.nodes.append(node)
        return node

    def _node(self, tensor: Tensor) -> Node:
        if isinstance(tensor, FakeTensor):
            node: Node | None = getattr(tensor, "metafast_node", None)
            if node is None or tensor.fake_mode is not self._mode:
                raise NotRecordableError("the computation makes a tensor by something that torch does not tell of")
            return node
        if id(tensor) not in self._reached:
            self._reached[id(tensor)] = self._appended(Node(TENSOR, tensor, value=Form.of(tensor)))
        return self._reached[id(tensor)]

    def _note(self, result: Any, node: Node) -> None:
        """Remembers which node gives a tensor, or the tensors in lists and tuples."""
        if isinstance(result, FakeTensor):
            result.metafast_node = node  # type: ignore[attr-defined]
        elif isinstance(result, (list, tuple)):
            for index, inner in enumerate(result):
                if isinstance(inner, (Tensor, list, tuple)):
                    self._note(inner, self._appended(part(node, index)))


@functools.cache
def _has_composite_kernel(op: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


@functools.cache
def _is_decomposed(op: OpOverload, device: str | None) -> bool:
    """Whether autograd, where it is not passed by, would run an operation as several others."""
    return device is None or not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), device)


def _device(value: Any) -> str | None:
    """The dispatch key of the first tensor's device; None without any."""
    if isinstance(value, Tensor):
        return torch._C._dispatch_key_for_device(value.device.type)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((found for found in map(_device, parts) if found), None)
