"""Calls of a meta-learner as programs: recorded at the first call of a kind, replayed at the next ones."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from metafast.backend import requested_backend
from metafast.inner import Rule
from metafast.meta.surroundings import may_have_changed
from metafast.program import NotRecordableError, Program

logger = logging.getLogger("metafast")

# Each holds the intermediate values of a step.
KEPT = 8


class Captured:
    """Functions of a module's parameters and buffers and of other tensors, replayed.

    Args:
        module: whose parameters and buffers the functions use.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # With the buffers that each leaves changed, None for those whose values it gives as they were.
        self._programs: OrderedDict[Any, tuple[Program, list[str | None]]] = OrderedDict()

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any, update_buffers: bool = True) -> Any:
        """``function(*arguments)`` without a graph; recorded when the name, the arguments' structure and shapes, or
        anything in :meth:`_settings` is new.

        Args:
            function: gives a pytree of tensors; runs with the module's parameters as leaves of a graph of its own.
            arguments: pytrees of tensors; None stands for itself.
            update_buffers: whether buffers get the values that the function leaves in them.
        """
        leaves, structure = pytree.tree_flatten(arguments)
        state, names = self._state()
        inputs = [*(tensor.detach() for tensor in state.values()), *(leaf for leaf in leaves if leaf is not None)]
        key = (
            name,
            str(structure),
            tuple(leaf is None for leaf in leaves),
            tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs),
            tuple(tensor.requires_grad for tensor in state.values()),
            names,
            self._settings(inputs[0].device.type),
        )
        if key not in self._programs:
            # Buffers that may have changed, and whether others stand in their places.
            changed: dict[str, bool] = {}

            def run(*tensors: Tensor) -> Any:
                given = iter(tensors)
                own = {key: next(given).detach().requires_grad_(tensor.requires_grad) for key, tensor in state.items()}
                now = [None if leaf is None else next(given) for leaf in leaves]
                before = {key: (own[key], own[key]._version) for key, _ in self._module.named_buffers()}
                with _reparametrize_module(self._module, own, tie_weights=True):
                    result = function(*pytree.tree_unflatten(now, structure))
                for key, (tensor, version) in before.items():
                    if may_have_changed(own[key], tensor, version):
                        changed[key] = own[key] is not tensor
                return result, [own[key] for key in changed]

            program = self._recorded(name, run, inputs)
            # What was recorded knows which of them did change.
            written = dict(zip(state, program.writes, strict=False))
            self._programs[key] = program, [name if new or written[name] else None for name, new in changed.items()]
            if len(self._programs) > KEPT:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        program, updated = self._programs[key]
        result, values = program(inputs)
        if update_buffers:
            for buffer, value in zip(updated, values, strict=True):
                if buffer is not None:
                    state[buffer].copy_(value)
        return result

    @staticmethod
    def _recorded(name: str, run: Callable[..., Any], inputs: list[Tensor]) -> Program:
        started = time.perf_counter()
        program = Program(run, inputs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in program.reached):
            raise NotRecordableError(
                "model and loss_fn reach a tensor that requires a gradient and is no parameter of the learner, so that it "
                "would get none: make it one, or switch it off by requires_grad_(False)"
            )
        seconds, mebibytes = time.perf_counter() - started, program.bytes / 2**20
        logger.info("capture: recorded %s in %.1f s, %.0f MiB of intermediate values", name, seconds, mebibytes)
        return program

    def _state(self) -> tuple[dict[str, Tensor], tuple[tuple[str, str], ...]]:
        """The module's parameters and buffers by their first names; and every name of them, with the first one."""
        first: dict[int, str] = {}
        state: dict[str, Tensor] = {}
        names = []
        for name, tensor in itertools.chain(
            self._module.named_parameters(remove_duplicate=False), self._module.named_buffers(remove_duplicate=False)
        ):
            known = first.setdefault(id(tensor), name)
            state.setdefault(known, tensor)
            names.append((name, known))
        return state, tuple(names)

    def _settings(self, device: str) -> tuple[Any, ...]:
        """What the module's functions depend on besides tensors."""
        return (
            torch.is_grad_enabled(),
            requested_backend(),
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            torch.get_default_dtype(),
            tuple(
                (name, repr(value))
                for name, value in vars(self._module).items()
                # The outcome is of the call before.
                if name != "outcome" and _is_plain(value)
            ),
            tuple(_module_settings(module) for module in self._module.modules() if module is not self._module),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles record their own."""
        return {"_module": self._module, "_programs": OrderedDict()}


def _module_settings(module: nn.Module) -> tuple[Any, ...]:
    """What may change in a module between calls: numbers and strings, which tensors it has besides its own, its hooks."""
    return (
        type(module),
        tuple(
            # Tensors are read live, as long as they are the same ones.
            (name, id(value) if type(value) is Tensor else repr(value))
            for name, value in vars(module).items()
            if type(value) is Tensor or _is_plain(value)
        ),
        *(tuple(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)),
        tuple(module._backward_pre_hooks),
    )


def _is_plain(value: Any) -> bool:
    """Whether a module's attribute is a setting: a number, a string, a rule, or a list or dict of such."""
    if isinstance(value, dict):
        return all(map(_is_plain, itertools.chain(value, value.values())))
    return isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device, Rule)) or (
        isinstance(value, (list, tuple)) and all(map(_is_plain, value))
    )
