"""Update rules of the inner loop: what they are, as small frozen objects that carry no tensors.

A rule is applied by :func:`metafast.task_update`. Rates that are learned are tensors: a rule says which ones
(``learn``), the meta-learner owns them and passes them beside the rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

__all__ = ["GRANULARITIES", "SGD", "Rule"]

GRANULARITIES: dict[str, str] = {
    "number": "one number",
    "step": "one a step (LSLR)",
    "tensor": "one a parameter tensor",
    "tensor_step": "one a parameter tensor and step (MAML++)",
    "parameter": "one a single parameter (Meta-SGD)",
    "parameter_step": "one a single parameter and step",
}
"""What a learned rate can be, by the name that ``learn`` takes."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What every rule says besides its own numbers.

    Args:
        learn: which rates the meta-learner learns, starting at the rule's numbers: the name of one (learned as one
            number), or a mapping of names to one of ``"number"``, ``"step"`` (LSLR), ``"tensor"``, ``"tensor_step"``
            (MAML++, Antoniou et al. 2019), ``"parameter"`` (Meta-SGD, Li et al. 2017) or ``"parameter_step"``. Kept as
            a sorted tuple of pairs, so that rules can be compared and hashed.
        learn_log: learn the logarithms of these rates, so that they stay positive.
        clip_norm: scales each task's gradients, all tensors together, to at most this 2-norm, as
            :func:`torch.nn.utils.clip_grad_norm_` does; None leaves them.
        clip_value: clips every element of the gradients to at most this magnitude, after ``clip_norm``; None leaves
            them.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: ``learn`` names no rate of the rule, no such granularity, or with ``learn_log`` a rate that is 0;
            ``learn_log`` without ``learn``; a clipping threshold that is not above 0.
    """

    learn: str | Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    learn_log: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None

    rate_names: ClassVar[tuple[str, ...]] = ()
    """The numbers that tensors can replace."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "learn", self._checked_learn())
        _check_flag("learn_log", self.learn_log)
        if self.learn_log and not self.learn:
            raise ValueError("learn_log: expected False where learn names no rate, got True")
        for name in self.learned if self.learn_log else ():
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: expected more than 0, to learn its logarithm, got 0")
        for name in ("clip_norm", "clip_value"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), above=0.0)

    @property
    def learned(self) -> dict[str, str]:
        """The granularity of each learned rate, by its name."""
        return dict(self.learn)  # type: ignore[arg-type]  # pairs, since __post_init__

    @property
    def state_names(self) -> tuple[str, ...]:
        """What a step remembers of each parameter for the next one, with the names that torch.optim gives it."""
        return ()

    @property
    def keeps_state(self) -> bool:
        """Whether a step needs what the step before remembered of each parameter."""
        return bool(self.state_names)

    def __str__(self) -> str:
        given = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def _checked_learn(self) -> tuple[tuple[str, str], ...]:
        learn = self.learn
        if isinstance(learn, str):
            learn = ((learn, "number"),)
        try:
            pairs = dict(learn)
        except (TypeError, ValueError):
            raise TypeError(
                f"learn: expected the name of a rate or a mapping of such names to granularities, got {self.learn!r}"
            ) from None
        for name, granularity in pairs.items():
            if name not in self.rate_names:
                raise ValueError(f"learn: expected names among {', '.join(self.rate_names)}, got {name!r}")
            if granularity not in GRANULARITIES:
                raise ValueError(f"learn[{name!r}]: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        return tuple(sorted(pairs.items()))


@dataclass(frozen=True)
class SGD(Rule):
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
        learn, learn_log, clip_norm, clip_value: see :class:`Rule`; rates are ``lr`` and ``weight_decay``.

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
        super().__post_init__()

    @property
    def state_names(self) -> tuple[str, ...]:
        """The momentum buffer, where there is momentum."""
        return ("momentum_buffer",) if self.momentum != 0 else ()


def _check_number(name: str, number: float, minimum: float = -math.inf, above: float = -math.inf) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if not math.isfinite(number) or number < minimum or number <= above:
        bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
        bound = bound if above == -math.inf else f" above {above:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {number}")


def _check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
