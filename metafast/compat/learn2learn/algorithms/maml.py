"""MAML by clones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metafast.acceleration import Names
from metafast.compat import single_task_update
from metafast.compat.learn2learn.algorithms.base_learner import BaseLearner
from metafast.compat.learn2learn.utils import Module, check_lengths, clone_module, update_module
from metafast.inner import SGD


def maml_update(model: Module, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None) -> Module:
    """Puts p − lr · g in the place of every parameter p of ``model``, differentiably, in one call of the update op.

    Args:
        model: is changed; its tensors are not.
        lr: a number or a tensor.
        grads: one per parameter, None for a parameter that stays; None: ``model`` is updated by its ``update`` attributes.

    Returns:
        ``model``.
    """
    if grads is None:
        return update_module(model)
    params = list(model.parameters())
    check_lengths("maml_update", "grads", len(params), len(grads))
    pairs = [(p, g) for p, g in zip(params, grads, strict=False) if g is not None]
    if not pairs:
        return update_module(model)
    old = [p for p, _ in pairs]
    rates = {"lr": single_task_update.broadcast(lr, old)} if isinstance(lr, Tensor) else None
    # Descending by a negative rate is ascending by its absolute value.
    number = 0.0 if isinstance(lr, Tensor) else float(lr)
    rule = SGD(lr=abs(number), maximize=number < 0)
    new, _ = single_task_update.update(rule, old, [g for _, g in pairs], rates=rates)
    return update_module(model, memo=dict(zip(old, new, strict=True)))


class MAML(BaseLearner):
    """``learn2learn.algorithms.MAML``: MAML (Finn et al., ICML 2017) or, with ``first_order``, FOMAML, one task at a time.

    For example::

        maml = learn2learn.algorithms.MAML(nn.Linear(20, 10), lr=0.01)
        clone = maml.clone()
        clone.adapt(loss(clone(x), y))
        loss(clone(x), y).backward()  # the meta-gradient, in maml's parameters

    :class:`metafast.MAML` runs many tasks side by side, with ``checkpoint=True`` in the memory of one step.

    Args:
        model: module to wrap.
        lr: learning rate of the inner steps.
        first_order: take inner gradients as constants.
        allow_unused: allow parameters that the loss does not reach; None: as ``allow_nograd``.
        allow_nograd: allow parameters that do not require a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        _names: Names | None = None,
    ) -> None:
        super().__init__(model, _names)
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """Takes an inner step on ``loss``. None stands for the learner's own setting.

        Raises:
            RuntimeError: a parameter does not require a gradient, or has none, and that was not allowed.
        """
        first_order = self.first_order if first_order is None else first_order
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        params = list(self.module.parameters())
        wanted = [p for p in params if p.requires_grad] if allow_nograd else params
        try:
            found = torch.autograd.grad(
                loss, wanted, retain_graph=not first_order, create_graph=not first_order, allow_unused=allow_unused
            )
        except RuntimeError as error:
            raise RuntimeError(f"{error} (adapt: allow_nograd=True or allow_unused=True may help)") from error
        grads = dict(zip(wanted, found, strict=True))
        self.module = maml_update(self.module, self.lr, [grads.get(p) for p in params])

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """A learner of a clone of the module; see :func:`clone_module`. None stands for this learner's setting."""
        return MAML(
            clone_module(self.module),
            lr=self.lr,
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
            _names=self._names,
        )
