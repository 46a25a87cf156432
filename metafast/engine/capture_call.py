"""A call as a function of tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.engine.placed_tensors import placed
from metafast.engine.replay_state import may_have_changed


class Call:
    """A function that takes a module's parameters and buffers as arguments, before its other tensors.

    Args:
        module: the module whose parameters and buffers the function uses.
        state: the parameters and buffers by name.
        function: gives a pytree of tensors.
        structure: structure of the function's arguments.
        absent: for each leaf of the arguments, whether it is None.
    """

    def __init__(
        self,
        module: nn.Module,
        state: dict[str, Tensor],
        function: Callable[..., Any],
        structure: pytree.TreeSpec,
        absent: list[bool],
    ) -> None:
        self.state = state
        self._module = module
        self._function = function
        self._structure = structure
        self._absent = absent

    def run(self, tensors: list[Tensor], changed: dict[str, bool] | None = None) -> tuple[Any, list[Tensor]]:
        """The function's result, and the buffers that it may have changed.

        Args:
            tensors: replace those of ``state``, then the arguments that are not None. Buffers may be written to.
            changed: gets the names of the changed buffers, and whether other tensors took their places.
        """
        given = iter(tensors)
        own = {name: next(given).detach().requires_grad_(tensor.requires_grad) for name, tensor in self.state.items()}
        arguments = pytree.tree_unflatten([None if absent else next(given) for absent in self._absent], self._structure)
        before = {name: (own[name], own[name]._version) for name, _ in self._module.named_buffers()}
        with placed(self._module, own):
            result = self._function(*arguments)
        changed = {} if changed is None else changed
        for name, (tensor, version) in before.items():
            if may_have_changed(own[name], tensor, version):
                changed[name] = own[name] is not tensor
        return result, [own[name] for name in changed]
