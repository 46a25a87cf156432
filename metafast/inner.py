"""Update rules of the inner loop, as small frozen objects that carry no tensors.

:func:`metafast.task_update` applies a rule. Learned rates are tensors: the rule names them (``learn``), the meta-learner
owns them and passes them beside the rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

__all__ = ["GRANULARITIES", "SGD", "Adam", "AdamW", "RMSprop", "Rule"]

GRANULARITIES: dict[str, str] = {
    "number": "one number",
    "step": "one per step (LSLR)",
    "tensor": "one per parameter tensor",
    "tensor_step": "one per parameter tensor and step (MAML++)",
    "parameter": "one per single parameter (Meta-SGD)",
    "parameter_step": "one per single parameter and step",
}
"""Granularities of a learned rate, by the name that ``learn`` takes."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of the rules: learned rates and clipping.

    Args:
        learn: which rates the meta-learner learns, starting at the rule's numbers: the name of one (learned as one
            number), or a mapping of names to one of ``"number"``, ``"step"`` (LSLR), ``"tensor"``, ``"tensor_step"``
            (MAML++, Antoniou et al. 2019), ``"parameter"`` (Meta-SGD, Li et al. 2017) or ``"parameter_step"``. The
            attribute is a sorted tuple of pairs, so that rules can be compared and hashed.
        learn_log: learn the logarithms of these rates, so that they stay positive.
        clip_norm: scales each task's gradients, all tensors together, to at most this 2-norm, as
            :func:`torch.nn.utils.clip_grad_norm_` does; None leaves them.
        clip_value: clips every element of the gradients to at most this magnitude, after ``clip_norm``; None leaves
            them.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: ``learn`` names something that is no rate of the rule, or an unknown granularity; ``learn_log`` comes
            without ``learn``, or with a rate that is 0; a clipping threshold is not above 0.
    """

    learn: str | Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    learn_log: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None

    rate_names: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
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
        """Names of the tensors that a step keeps of each parameter for the next step, as torch.optim calls them."""
        return ()

    @property
    def keeps_state(self) -> bool:
        """Whether a step needs the state of the step before."""
        return bool(self.state_names)

    def formula(
        self,
        step: int,
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor | None],
        lr: Tensor | float,
        weight_decay: Tensor | float | None,
    ) -> tuple[Tensor, ...]:
        """One step for one parameter tensor, in plain PyTorch: the method that a new rule writes.

        A class that overrides this method runs on the reference path. The rules of this module have kernels instead and do
        not use it. A new rule has a number ``lr``; ``weight_decay`` and ``maximize`` are optional. Its ``state_names`` say
        what it remembers.

        Args:
            step: number of the step, from 0.
            param: ``[T, *shape]``, or ``[*shape]`` where all tasks share the parameter, as at the first step.
            grad: gradient ``[T, *shape]``, clipped already, and negated where ``maximize`` is set.
            state: what the step before returned, by ``state_names``; None at the first step.
            lr: learning rate: the rule's number, or a tensor that broadcasts with ``param``.
            weight_decay: likewise; None where there is none.

        Returns:
            The next parameter ``[T, *shape]`` and the next state, in the order of ``state_names``. They must be
            differentiable in all tensors for ``order=2``.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a rule with a formula of its own")

    @property
    def has_own_formula(self) -> bool:
        """Whether :meth:`formula` computes the step, and no kernel."""
        return type(self).formula is not Rule.formula

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
        dampening: factor 1 − dampening of the gradient in the momentum buffer; the first step has none.
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


@dataclass(frozen=True)
class Adam(Rule):
    """Adam with the semantics of :class:`torch.optim.Adam`, for the parameters of T tasks.

    At every step t = 1, 2, ..., with g negated first where ``maximize`` is set::

        g ← g + weight_decay · θ
        m ← β₁ · m + (1 − β₁) · g
        v ← β₂ · v + (1 − β₂) · g²
        θ ← θ − lr · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ) + eps_root) + eps)

    Where √ is 0 (rows of an embedding that no example used so far) its derivative is taken as 0, the limit.

    Args:
        lr: learning rate, at least 0.
        betas: β₁ and β₂, each at least 0 and less than 1.
        eps: added to the square root; at least 0.
        eps_root: added under the square root, at least 0; above 0 the update is smooth where gradients are 0 (as in
            optax; torch has none).
        weight_decay: factor of the L2 penalty, at least 0.
        amsgrad: divide by the greatest v so far (Reddi et al., "On the convergence of Adam and beyond", ICLR 2018).
        maximize: ascend instead.
        learn, learn_log, clip_norm, clip_value: see :class:`Rule`; rates are ``lr`` and ``weight_decay``.

    Raises:
        TypeError: an argument is not of the type above. A tensor belongs in ``task_update``'s ``rates``.
        ValueError: an argument is outside of the range above.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False

    rate_names: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    decoupled: ClassVar[bool] = False
    """Whether weight decay shrinks the parameter directly instead of adding to the gradient."""

    def __post_init__(self) -> None:
        _check_number("lr", self.lr, minimum=0.0)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas: expected two numbers, got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for i, beta in enumerate(self.betas):
            _check_number(f"betas[{i}]", beta, minimum=0.0, below=1.0)
        _check_number("eps", self.eps, minimum=0.0)
        _check_number("eps_root", self.eps_root, minimum=0.0)
        _check_number("weight_decay", self.weight_decay, minimum=0.0)
        _check_flag("amsgrad", self.amsgrad)
        _check_flag("maximize", self.maximize)
        super().__post_init__()

    @property
    def state_names(self) -> tuple[str, ...]:
        """The averages of the gradient and of its square, and with ``amsgrad`` the greatest average of the square."""
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, the semantics of :class:`torch.optim.AdamW`.

    As :class:`Adam`, but the gradient is left alone and θ ← (1 − lr · weight_decay) · θ before the step (Loshchilov and
    Hutter, "Decoupled weight decay regularization", ICLR 2019). ``weight_decay`` is 0.01 by default, as in torch.
    """

    weight_decay: float = 0.01

    decoupled: ClassVar[bool] = True


@dataclass(frozen=True)
class RMSprop(Rule):
    """RMSprop with the semantics of :class:`torch.optim.RMSprop`, for the parameters of T tasks.

    At every step, with g negated first where ``maximize`` is set::

        g ← g + weight_decay · θ
        v ← alpha · v + (1 − alpha) · g²
        a ← alpha · a + (1 − alpha) · g       (where centered; else a = 0)
        b ← momentum · b + g / (√(v − a²) + eps)
        θ ← θ − lr · b

    Where √ is 0 (rows of an embedding that no example used so far) its derivative is taken as 0, the limit; where
    v − a² is less than 0, by rounding, it is taken as 0.

    Args:
        lr: learning rate, at least 0.
        alpha: smoothing constant, at least 0 and at most 1.
        eps: at least 0.
        weight_decay: factor of the L2 penalty, at least 0.
        momentum: at least 0; with 0 the rule keeps no buffer of it.
        centered: divide by an estimate of the gradient's standard deviation.
        maximize: ascend instead.
        learn, learn_log, clip_norm, clip_value: see :class:`Rule`; rates are ``lr`` and ``weight_decay``.

    Raises:
        TypeError: an argument is not of the type above. A tensor belongs in ``task_update``'s ``rates``.
        ValueError: an argument is outside of the range above.
    """

    lr: float
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    maximize: bool = False

    rate_names: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")

    def __post_init__(self) -> None:
        _check_number("lr", self.lr, minimum=0.0)
        _check_number("alpha", self.alpha, minimum=0.0)
        if self.alpha > 1:
            raise ValueError(f"alpha: expected a finite number of at most 1, got {self.alpha}")
        _check_number("eps", self.eps, minimum=0.0)
        _check_number("weight_decay", self.weight_decay, minimum=0.0)
        _check_number("momentum", self.momentum, minimum=0.0)
        _check_flag("centered", self.centered)
        _check_flag("maximize", self.maximize)
        super().__post_init__()

    @property
    def state_names(self) -> tuple[str, ...]:
        """The average of the squared gradient; the momentum buffer and the average of the gradient where there are any."""
        buffer = ("momentum_buffer",) if self.momentum != 0 else ()
        return ("square_avg", *buffer, *(("grad_avg",) if self.centered else ()))


def _check_number(
    name: str, number: float, minimum: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if not math.isfinite(number) or number < minimum or number <= above or number >= below:
        bounds = [
            *([f"of at least {minimum:g}"] if minimum != -math.inf else []),
            *([f"above {above:g}"] if above != -math.inf else []),
            *([f"below {below:g}"] if below != math.inf else []),
        ]
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}".rstrip() + f", got {number}")


def _check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
