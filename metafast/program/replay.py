"""Replaying a program: its calls, one after another, in memory of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metafast.program.build import Built, Call
from metafast.program.dead_code import simplified
from metafast.program.plan import Plan
from metafast.program.recording import record


class Program:
    """``function(*inputs)`` for inputs of the same shapes, dtypes and devices, without Python, autograd or allocation.

    Args:
        function: gives a pytree of tensors, and fulfils the conditions of :func:`metafast.program.record`.
        inputs: inputs like those of later calls.
        staying: numbers of inputs that are expected to stay where they are in memory, such as a model's parameters. Where
            the function does not change them and they are contiguous, they are read there: a replay neither copies them nor
            keeps a copy.

    Attributes:
        bytes: size of the intermediate values.
        reached: tensors that the function reads, or writes, besides its inputs.
        writes: for each input, whether the function changes it in place. Inputs themselves stay as they are.
        constant: for each tensor in the result, whether it depends on nothing, and is the same at every call.
        mode: the mode of the tensors without data that were recorded.

    Raises:
        NotRecordableError: see :func:`metafast.program.record`.
    """

    def __init__(
        self, function: Callable[..., Any], inputs: list[Tensor], staying: Collection[int] = frozenset()
    ) -> None:
        recorded = record(function, [tensor.contiguous() for tensor in inputs])
        self._structure = recorded.outputs
        given = [
            tensor.detach() if number in staying and _is_dense(tensor) else None for number, tensor in enumerate(inputs)
        ]
        self.reached = recorded.reached
        self.mode = recorded.mode
        self._lock = threading.Lock()
        # Inference tensors: operations on them pass autograd by.
        with torch.inference_mode():
            plan = Plan(simplified(recorded.nodes))
            built = Built(plan, inputs[0].device, given)
            self.bytes = plan.bytes
            self._inputs, self._outputs, self._calls = built.inputs, built.outputs, built.calls
            self.writes, self.constant, self._in_place = built.writes, built.constant, built.in_place
            if inputs[0].device.type == "cuda":
                self._take(inputs)
                self._calls = [_as_cuda_graph(self._calls, inputs[0].device)]

    def fits(self, inputs: list[Tensor]) -> bool:
        """Whether inputs that are read where they are have stayed there; ``run`` takes no others."""
        return all(
            now.data_ptr() == then.data_ptr() and _is_dense(now)
            for now, then, in_place in zip(inputs, self._inputs, self._in_place, strict=True)
            if in_place
        )

    def copied(self, inputs: list[Tensor]) -> list[Tensor]:
        """The inputs, with copies of those that a replay copies."""
        return [given if in_place else given.clone() for given, in_place in zip(inputs, self._in_place, strict=True)]

    def run(self, inputs: list[Tensor]) -> Any:
        """The function's result, in memory of its own."""
        with self._lock:
            with torch.inference_mode():
                self._take(inputs)
                for call in self._calls:
                    call()
            # Outside, so that these are tensors like any other.
            with torch.no_grad():
                leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._outputs]
        return pytree.tree_unflatten(leaves, self._structure)

    def _take(self, inputs: list[Tensor]) -> None:
        for static, given, in_place in zip(self._inputs, inputs, self._in_place, strict=True):
            if not in_place:
                static.copy_(given)


def _is_dense(tensor: Tensor) -> bool:
    """Whether memory holds the tensor as it was recorded."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() and not tensor.is_inference()


def _as_cuda_graph(calls: list[Call], device: torch.device) -> Call:
    """One call that replays all calls as a CUDA graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # Once before, on a stream of its own: kernels are compiled and libraries set up, which a capture may not do.
    with torch.cuda.stream(stream), torch.random.fork_rng([device]):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
