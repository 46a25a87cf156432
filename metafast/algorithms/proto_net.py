"""Prototypical networks."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from metafast.algorithms.learner import MetaLearner, Options
from metafast.algorithms.prototypes import Part, Prototypes, check_ways, inputs_of, labels_of, of_body
from metafast.engine.adapted_parameters import ParameterSplit
from metafast.engine.inner_loop import Start
from metafast.engine.learners import Learners
from metafast.engine.step import TaskResults
from metafast.engine.task_batch import LossFn, Params, PerStep
from metafast.engine.task_model import TaskModel
from metafast.inner import SGD


class ProtoNet(MetaLearner):
    """Prototypical networks (Snell, Swersky and Zemel, NIPS 2017, algorithm 1), all tasks side by side.

    A task's model classifies by distance to its classes' prototypes: logits −‖f(x) − c_k‖² (equation 2), where c_k is the
    mean embedding of class k's support examples (equation 1). Nothing is adapted by gradients; classes without support
    examples are never chosen::

        meta = metafast.ProtoNet(embedding, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), ways=5)
        meta((x, y), (query_x, query_y)).backward()
        logits = meta.adapt((x, y))(query_x)

    Args:
        model: embeds inputs ``[n, …]`` as ``[n, d]``.
        loss_fn: as for :class:`metafast.MetaLearner`; the model it gets is the classifier: ``model(inputs)`` are
            the logits ``[n, ways]``.
        ways: number of classes; labels count from 0.
        inputs, labels: functions of a task's support set: ``inputs(batch)`` gives the model's input, ``labels(batch)`` the
            classes ``[n]``. Without them, batches are pairs ``(inputs, labels)``, or dicts of inputs and ``"label"`` or
            ``"labels"``; of several inputs the model gets the dict.
        options: as for :class:`metafast.MetaLearner`. There are no steps to checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        ways: int,
        inputs: Part = inputs_of,
        labels: Part = labels_of,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, loss_fn, inner=SGD(lr=0.0), steps=0, order=1, **options)
        self.ways = check_ways(ways)
        batching = options.get("task_batching", "auto")
        self._prototypes = TaskModel(Prototypes(model, ways, inputs, labels), batching, prefix="model.")
        self._use_task_model(_Nearest(model), batching)

    def adapt(self, support: Any, steps: int | None = None) -> Learners:
        """Every task's classifier: ``learners(inputs)`` are the logits ``[T, n, ways]``.

        Args:
            support: as in a call.
            steps: None or 0: there are no steps to take.
        """
        if steps:
            raise ValueError(f"steps: ProtoNet takes none, expected None or 0, got {steps}")
        return super().adapt(support, 0)

    def start(self, support: Any) -> Start:
        """The prototypes of every task."""
        if isinstance(support, PerStep):
            raise TypeError("support: ProtoNet takes no steps, expected one support set, got PerStep")
        shared = self.split_parameters().shared
        prototypes, present = self._prototypes.compute({}, shared, (support,))
        own = {"prototypes": prototypes, "present": present}
        return Start(params={}, shared=self._names_for_tasks(shared), own=own)

    def split_parameters(self) -> ParameterSplit:
        """The model's parameters, all shared by the tasks."""
        adapted, shared = super().split_parameters()
        return ParameterSplit({}, {**adapted, **shared})

    def _names_for_tasks(self, params: Params) -> Params:
        return of_body(params)

    def task_results(self, support: Any, query: Any, tasks: int) -> TaskResults:
        """The query losses of the classifiers by prototypes."""
        start = self.start(support)
        losses, metrics = self.task_losses.compute(start.own, start.shared, query)
        return TaskResults(losses, torch.empty(0, tasks, device=losses.device), losses, metrics)


class _Nearest(nn.Module):
    """Logits −‖f(x) − c_k‖² of an embedding f, with prototypes per task."""

    prototypes: Tensor
    present: Tensor

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("prototypes", torch.empty(0), persistent=False)
        self.register_buffer("present", torch.empty(0), persistent=False)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        difference = self.body(*inputs, **options).unsqueeze(-2) - self.prototypes
        return (-difference.square().sum(-1)).masked_fill(~self.present, -torch.inf)
