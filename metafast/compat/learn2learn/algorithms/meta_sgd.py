"""Meta-SGD by clones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from metafast.acceleration import Names
from metafast.compat import single_task_update
from metafast.compat.learn2learn.algorithms.base_learner import BaseLearner
from metafast.compat.learn2learn.utils import Module, clone_module, update_module
from metafast.inner import SGD


def meta_sgd_update(model: Module, lrs: Iterable[Tensor], grads: Sequence[Tensor | None]) -> Module:
    """Puts p − α ∘ g in the place of every parameter p of ``model``, differentiably, in one call of the update op."""
    triples = [(p, a, g) for p, a, g in zip(model.parameters(), lrs, grads, strict=False) if g is not None]
    if not triples:
        return model
    old = [p for p, _, _ in triples]
    rates = {"lr": [a for _, a, _ in triples]}
    new, _ = single_task_update.update(SGD(lr=0.0), old, [g for _, _, g in triples], rates=rates)
    return update_module(model, memo=dict(zip(old, new, strict=True)))


class MetaSGD(BaseLearner):
    """``learn2learn.algorithms.MetaSGD``: Meta-SGD (Li et al., arXiv 1707.09835), one task at a time.

    Args:
        model: module to wrap.
        lr: initial rate of every parameter.
        first_order: take inner gradients as constants.
        lrs: the rates themselves, one tensor per parameter; None: parameters of this learner that start at ``lr``.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        first_order: bool = False,
        lrs: nn.ParameterList | list[Tensor] | None = None,
        *,
        _names: Names | None = None,
    ) -> None:
        super().__init__(model, _names)
        if lrs is None:
            lrs = nn.ParameterList([nn.Parameter(torch.ones_like(p) * lr) for p in model.parameters()])
        self.lrs = lrs
        self.first_order = first_order

    def clone(self) -> MetaSGD:
        """A learner of a clone of the module, with clones of the rates."""
        return MetaSGD(
            clone_module(self.module),
            lrs=[lr.clone() for lr in self.lrs],
            first_order=self.first_order,
            _names=self._names,
        )

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """Takes an inner step on ``loss``. None stands for the learner's own setting."""
        first_order = self.first_order if first_order is None else first_order
        params = list(self.module.parameters())
        grads = torch.autograd.grad(loss, params, retain_graph=not first_order, create_graph=not first_order)
        self.module = meta_sgd_update(self.module, self.lrs, grads)
