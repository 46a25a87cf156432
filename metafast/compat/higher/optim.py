"""Steps of torch's optimizers that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from metafast import inner
from metafast.compat import single_task_update
from metafast.compat.higher.patch import Functional

Override = dict[str, list[Any]]
GradCallback = Callable[[list[Any]], list[Any]]
Group = dict[str, Any]


# By class; those that inherit from another one come before it.
SERVED: dict[type[torch.optim.Optimizer], type[inner.Rule]] = {
    torch.optim.SGD: inner.SGD,
    torch.optim.AdamW: inner.AdamW,
    torch.optim.Adam: inner.Adam,
    torch.optim.RMSprop: inner.RMSprop,
}


class DifferentiableOptimizer:
    """An optimizer whose steps make new tensors, with a graph, instead of changing parameters.

    Args:
        other: the optimizer; its groups and its state are copied.
        reference_params: the parameters of its model.
        fmodel: the functional copy that gets the results; None: ``step`` is given the parameters.
        device: device of the copied state; None: as it is.
        override: settings of the groups, as for ``innerloop_ctx``.
        grad_callback: changes the list of all gradients (None for a parameter without one) before each step.
        track_higher_grads: False keeps no graph of the steps.

    Attributes:
        param_groups: settings of the groups; changes take effect at the next step.
        state: a dict per group: the state of each of its parameters, by number.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: Functional | None = None,
        device: torch.device | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
    ) -> None:
        self._kind = _kind_of(other)
        self.param_groups: list[Group] = [
            {name: value for name, value in group.items() if name != "params"} for group in other.param_groups
        ]
        indices = {id(p): index for index, p in enumerate(reference_params)}
        missing = sum(id(p) not in indices for group in other.param_groups for p in group["params"])
        if missing:
            raise ValueError(f"opt: expected parameters of the model alone, got {missing} that are none")
        self._indices = [[indices[id(p)] for p in group["params"]] for group in other.param_groups]
        self.state: list[dict[int, dict[str, Any]]] = [
            {i: _copied(other.state[p], device) if p in other.state else {} for i, p in enumerate(group["params"])}
            for group in other.param_groups
        ]
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._tracks = track_higher_grads
        if override is not None:
            self._apply(override)

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Takes a step on ``loss`` and returns the parameters after it; ``fmodel`` has them from now on.

        Args:
            loss: scalar.
            params: the parameters at which ``loss`` was computed; None: the latest of ``fmodel``.
            override: settings from now on.
            grad_callback: replaces the optimizer's.
            kwargs: ignored, as by higher.
        """
        if override is not None:
            self._apply(override)
        if params is None:
            if self._fmodel is None:
                raise ValueError(
                    "params: expected the parameters, since the optimizer has no functional model, got None"
                )
            params = self._fmodel.fast_params
        params = list(params)
        grads = self._gradients(loss, params)
        callback = self._grad_callback if grad_callback is None else grad_callback
        if callback is not None:
            grads = callback(grads)
        updated = list(params)
        with torch.set_grad_enabled(self._tracks):
            for group, state, indices in zip(self.param_groups, self.state, self._indices, strict=True):
                self._update(group, state, indices, params, grads, updated)
        if not self._tracks:
            moved = {index for indices in self._indices for index in indices}
            updated = [p.detach().requires_grad_() if i in moved else p for i, p in enumerate(updated)]
        if self._fmodel is not None:
            self._fmodel.update_params(updated)
        return updated

    def _gradients(self, loss: Tensor, params: list[Tensor]) -> list[Any]:
        wanted = [p for p in params if p.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, create_graph=self._tracks, allow_unused=True))
        return [next(found) if p.requires_grad else None for p in params]

    def _update(
        self,
        group: Group,
        state: dict[int, dict[str, Any]],
        indices: list[int],
        params: list[Tensor],
        grads: list[Any],
        updated: list[Tensor],
    ) -> None:
        rates = _rates(group)
        rule = _rule(self._kind, {**group, **dict.fromkeys(rates, 0.0)})
        unserved = set(rates) - set(rule.rate_names)
        if unserved:
            raise TypeError(
                f"override: expected learned tensors for {' and '.join(rule.rate_names)} alone, "
                f"got them for {', '.join(sorted(unserved))}"
            )
        # Parameters that have come as far as each other take their step in one call.
        together: dict[int, list[int]] = {}
        for i, index in enumerate(indices):
            if grads[index] is not None:
                together.setdefault(_steps_done(rule, state[i]), []).append(i)
        for done, members in together.items():
            old = [params[indices[i]] for i in members]
            before = None
            if done and rule.keeps_state:
                before = {name: [state[i][name] for i in members] for name in rule.state_names}
            new, after = single_task_update.update(
                rule,
                old,
                [grads[indices[i]] for i in members],
                before,
                {name: single_task_update.broadcast(value, old) for name, value in rates.items()} or None,
                step=done,
            )
            for place, i in enumerate(members):
                updated[indices[i]] = new[place]
                state[i] = {"step": done + 1, **{name: tensors[place] for name, tensors in after.items()}}

    def _apply(self, override: Override) -> None:
        for name, values in override.items():
            if any(name not in group for group in self.param_groups):
                known = ", ".join(self.param_groups[0])
                raise ValueError(f"override: expected settings of the optimizer, {known}; got {name!r}")
            if len(values) not in (1, len(self.param_groups)):
                raise ValueError(
                    f"override[{name!r}]: expected 1 value or {len(self.param_groups)}, one per group, got {len(values)}"
                )
            for i, group in enumerate(self.param_groups):
                group[name] = values[0] if len(values) == 1 else values[i]


def _kind_of(opt: torch.optim.Optimizer) -> type[inner.Rule]:
    for kind, rule in SERVED.items():
        if isinstance(opt, kind):
            return rule
    names = ", ".join(f"torch.optim.{kind.__name__}" for kind in SERVED)
    raise TypeError(f"opt: expected one of {names}, got {type(opt).__name__}")


def _rule(kind: type[inner.Rule], settings: Group) -> inner.Rule:
    """The rule of a group's settings, without those that choose one of torch's implementations."""
    if kind is inner.Adam and settings.get("decoupled_weight_decay"):
        kind = inner.AdamW
    names = {field.name for field in fields(kind)} & settings.keys()
    return kind(**{name: _number(settings[name]) for name in names})


def _rates(group: Group) -> dict[str, Tensor]:
    """Settings that are tensors with a gradient or with a value for each parameter."""
    tensors = {name: value for name, value in group.items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if value.requires_grad or value.numel() != 1}


def _number(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_number(part) for part in value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _steps_done(rule: inner.Rule, state: dict[str, Any]) -> int:
    if any(state.get(name) is None for name in rule.state_names):
        return 0
    # torch's SGD keeps no count, and needs none but whether there was a step.
    return int(state.get("step", 1 if rule.keeps_state else 0))


def _copied(state: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    return {
        name: value.detach().clone().to(device=device) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
