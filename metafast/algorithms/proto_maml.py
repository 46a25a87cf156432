"""Proto-MAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from metafast.algorithms.learner import Options
from metafast.algorithms.maml import MAML
from metafast.algorithms.prototypes import Part, Prototypes, check_ways, inputs_of, labels_of, of_body
from metafast.engine.inner_loop import Start
from metafast.engine.task_batch import LossFn, Params, support_at
from metafast.engine.task_model import TaskModel
from metafast.inner import Rule

HEAD = ("weight", "bias")


class ProtoMAML(MAML):
    """Proto-MAML (Triantafillou et al., "Meta-Dataset", ICLR 2020, section 3): MAML whose head starts at prototypes.

    Every task's linear head starts at W_k = 2 c_k and b_k = −‖c_k‖² (equations 3 and 4 of the paper), the linear form of a
    prototypical network's classifier, and is adapted with the rest. The meta-gradient goes through this start as well.

    Args:
        model: embeds inputs ``[n, …]`` as ``[n, d]``.
        loss_fn: as for :class:`metafast.MAML`; the model it gets has the head: ``model(inputs)`` are logits ``[n, ways]``.
        ways, inputs, labels: as for :class:`metafast.ProtoNet`; with ``PerStep``, the first batch gives the prototypes.
        inner, steps, order, step_weights, options: as for :class:`metafast.MAML`. ``adapt_parameters`` chooses among the
            embedding's parameters; the head is always adapted, and its learned rates are "weight" and "bias". Rates per
            single parameter are not learned, since the head differs between tasks.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        ways: int,
        inner: Rule,
        steps: int = 1,
        order: int = 2,
        step_weights: Sequence[float] | None = None,
        inputs: Part = inputs_of,
        labels: Part = labels_of,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(inner, Rule) and any(kind.startswith("parameter") for kind in inner.learned.values()):
            raise ValueError(
                "inner: ProtoMAML learns rates for tensors and steps, not for single parameters of the head"
            )
        super().__init__(model, loss_fn, inner=inner, steps=steps, order=order, step_weights=step_weights, **options)
        self.ways = check_ways(ways)
        batching = options.get("task_batching", "auto")
        self._prototypes = TaskModel(Prototypes(model, ways, inputs, labels), batching, prefix="model.")
        self._use_task_model(_Headed(model), batching)

    def start(self, support: Any) -> Start:
        """The model's parameters for all tasks, and a head per task from its prototypes."""
        start = super().start(support)
        prototypes, _ = self._prototypes.compute({}, {**start.params, **start.shared}, (support_at(support, 0),))
        return Start(
            params=self._names_for_tasks(start.params),
            shared=self._names_for_tasks(start.shared),
            own={"weight": 2 * prototypes, "bias": -prototypes.square().sum(-1)},
            rates=start.rates,
            tables=frozenset(of_body({name: start.params[name] for name in start.tables})),
        )

    def _names_for_tasks(self, params: Params) -> Params:
        return of_body(params)

    def _rated(self, adapted: Params) -> Params:
        example = next(iter(adapted.values()))
        return {**of_body(adapted), **{name: example.new_empty(0) for name in HEAD}}


class _Headed(nn.Module):
    """An embedding and a linear head, which is another one for every task."""

    weight: Tensor
    bias: Tensor

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name in HEAD:
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        return nn.functional.linear(self.body(*inputs, **options), self.weight, self.bias)
