"""Rates of the inner rule that are learned with the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metafast.inner import Rule


class LearnedRates(nn.Module):
    """The rates that ``rule.learn`` names, as parameters that start at the rule's numbers.

    A rate is one parameter tensor: ``[]`` for granularity "number", ``[K]`` for "step", ``[n]`` for "tensor" and ``[K, n]``
    for "tensor_step", with n adapted tensors in the order of the model. For "parameter" and "parameter_step" it is one
    tensor per adapted tensor, ``[*shape]`` and ``[K, *shape]``. With ``rule.learn_log`` the tensors hold logarithms, so that
    rates stay positive.

    Args:
        rule: the inner rule.
        params: the adapted parameters by name.
        steps: number K of inner steps of training. Later steps use the rates of the last one.
    """

    def __init__(self, rule: Rule, params: Mapping[str, Tensor], steps: int) -> None:
        super().__init__()
        self._granularity = rule.learned
        self._log = rule.learn_log
        self._names = list(params)
        self._steps = max(steps, 1)
        example = next(iter(params.values()))
        # Single numbers are cheap to keep in float32 beside parameters of half precision.
        dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
        sizes = {
            "number": (),
            "step": (self._steps,),
            "tensor": (len(params),),
            "tensor_step": (self._steps, len(params)),
        }
        for rate, granularity in self._granularity.items():
            number = float(getattr(rule, rate))
            value = math.log(number) if self._log else number
            if granularity.startswith("parameter"):
                lead = (self._steps,) if granularity == "parameter_step" else ()
                # Not by a method of the parameter, which may be sharded: rates are not.
                tensors = {
                    _key(name): nn.Parameter(torch.full((*lead, *p.shape), value, dtype=p.dtype, device=p.device))
                    for name, p in params.items()
                }
                self.add_module(rate, nn.ParameterDict(tensors))
            else:
                rates = torch.full(sizes[granularity], value, dtype=dtype, device=example.device)
                self.register_parameter(rate, nn.Parameter(rates))

    def check_names(self, params: Iterable[str]) -> None:
        """Raises ValueError where rates are per tensor or parameter, and other parameters are adapted now."""
        by_name = any(granularity.startswith(("tensor", "parameter")) for granularity in self._granularity.values())
        if by_name and (changed := sorted(set(params) ^ set(self._names))):
            raise ValueError(
                "adapt_parameters: expected the parameters that the learner was made with, since it has learned rates for "
                f"each; got others in {', '.join(changed)}. Make a new learner after freezing or replacing parameters"
            )

    def forward(self, step: int) -> dict[str, Any]:
        """The rates of a step, as :func:`metafast.task_update` takes them."""
        return {rate: self._at(rate, granularity, step) for rate, granularity in self._granularity.items()}

    def _at(self, rate: str, granularity: str, step: int) -> Tensor | dict[str, Tensor]:
        learned = getattr(self, rate)
        row: Any = min(step, self._steps - 1) if granularity.endswith("step") else ...
        if granularity.startswith("parameter"):
            return {name: self._value(learned[_key(name)][row]) for name in self._names}
        values = self._value(learned[row])
        if granularity in ("tensor", "tensor_step"):
            return dict(zip(self._names, values.unbind(), strict=True))
        return values

    def _value(self, learned: Tensor) -> Tensor:
        return learned.exp() if self._log else learned


def _key(name: str) -> str:
    # Names of parameters may not contain dots.
    return name.replace(".", "/")


def learning(rule: Rule, rate: str, granularity: str) -> Rule:
    """The rule with this rate learned, unless its ``learn`` names the rate already."""
    if not isinstance(rule, Rule) or rate in rule.learned:
        return rule
    return replace(rule, learn={**rule.learned, rate: granularity})
