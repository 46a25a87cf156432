"""Update rules of the inner loop: what they are, as small frozen objects that carry no tensors.

A rule is applied by :func:`metafast.task_update`. Rates that are learned are tensors and are passed beside the rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

__all__ = ["SGD", "Rule"]


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with the semantics of :class:`torch.optim.SGD`, for the parameters of T tasks.

    At every step, with g negated first where ``maximize`` is set::

        g ← g + weight_decay · θ
        b ← momentum · b + (1 − dampening) · g       (the first step: b ← g)
        θ ← θ − lr · (g + momentum · b  if nesterov else  b)       (without momentum: θ ← θ − lr · g)

    Args:
        lr: learning rate, at least 0.
        momentum: at least 0; with 0 the rule keeps no state.
        dampening: of the momentum.
        nesterov: Nesterov's momentum, in the form of Sutskever et al., "On the importance of initialization and
            momentum in deep learning", ICML 2013; needs ``momentum > 0`` and ``dampening == 0``.
        weight_decay: factor of the L2 penalty, at least 0.
        maximize: ascend instead.

    Raises:
        TypeError: an argument is not of the type above. A tensor belongs in ``task_update``'s ``rates``.
        ValueError: an argument is outside of the range above.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    maximize: bool = False

    rate_names: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __post_init__(self) -> None:
        _check_number("lr", self.lr, minimum=0.0)
        _check_number("momentum", self.momentum, minimum=0.0)
        _check_number("dampening", self.dampening)
        _check_number("weight_decay", self.weight_decay, minimum=0.0)
        _check_flag("nesterov", self.nesterov)
        _check_flag("maximize", self.maximize)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "nesterov: expected momentum > 0 and dampening == 0, "
                f"got momentum={self.momentum} and dampening={self.dampening}"
            )

    @property
    def keeps_state(self) -> bool:
        """Whether a step needs what the step before remembered of each parameter."""
        return self.momentum != 0


Rule: TypeAlias = SGD


def _check_number(name: str, number: float, minimum: float = -math.inf) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if not math.isfinite(number) or number < minimum:
        at_least = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise ValueError(f"{name}: expected a finite number{at_least}, got {number}")


def _check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
