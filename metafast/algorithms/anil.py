"""ANIL: almost no inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import nn

from metafast.algorithms.learner import Options
from metafast.algorithms.maml import MAML
from metafast.engine.adapted_parameters import Selection
from metafast.engine.task_batch import LossFn
from metafast.inner import Rule


class ANIL(MAML):
    """ANIL (Raghu, Raghu, Bengio and Vinyals, ICLR 2020, section 4): MAML whose inner loop adapts the head alone.

    The inner step of section 4.1 changes the last layer alone: θ_m = (θ_1, …, θ_l − α ∇_θ_l L_i). All tasks share the body.
    The body gets its exact meta-gradient, which includes its effect on the head's inner gradients.

    Args:
        model, loss_fn, inner, steps, order, step_weights, options: as for :class:`metafast.MAML`.
        head: which parameters are the head: name patterns such as ``"head.*"``, or ``predicate(name, parameter)``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        head: Selection,
        inner: Rule,
        steps: int = 1,
        order: int = 2,
        step_weights: Sequence[float] | None = None,
        **options: Unpack[Options],
    ) -> None:
        if options.get("adapt_parameters") is not None:
            raise ValueError("adapt_parameters: expected none beside head, which says the same")
        options["adapt_parameters"] = head
        super().__init__(model, loss_fn, inner=inner, steps=steps, order=order, step_weights=step_weights, **options)
