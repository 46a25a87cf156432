"""A learner on a module beside the plain loop, over orders, modes and calls: what is equal, refused or different."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from plain_loop import adaptation, at, task
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_database import TASKS, Case, batches, loss_fn, model_of

import metafast
from metafast.inner import SGD
from metafast.program import NotRecordableError

STEPS, LR, TOLERANCE = 2, 0.05, 1e-7
# Two calls, each with a support and a query set.
DRAWS = 4 * TASKS


@dataclass
class Findings:
    """What became of the runs of a learner.

    Attributes:
        counts: runs by mode and outcome: "equal", "equal, as a loop", "refused"; or why there was nothing to compare.
        refused: messages of ours, by case and mode.
        wrong: what differs, or is an error where the plain loop runs.
    """

    counts: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Plain:
    """What the plain loop gives: the mean loss, its gradient and adapted parameters by name, and buffers afterwards.

    A support loss may be NaN and have the gradient 0: the mean over labels that are all ignored. A learner refuses it.
    """

    loss: torch.Tensor
    support_losses: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    adapted: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]

    @property
    def finite(self):
        return all(x.isfinite().all() for x in (self.loss, *self.support_losses, *self.gradients.values()))


def plain(model, support, query, order, steps=STEPS):
    """The plain loop, one task with all its steps after another, where a model's outputs depend on its calls before; else a
    step of all tasks after another, the order in which random numbers are drawn and buffers updated.

    Torch's fused attention has no second derivative.
    """
    by_step = [(step, index) for step in range(steps + 1) for index in range(TASKS)]
    with sdpa_kernel(SDPBackend.MATH):
        state = torch.get_rng_state()
        other = copy.deepcopy(model)
        by_task = _plain(other, support, query, order, steps, sorted(by_step, key=lambda call: call[1]))
        drawn = not torch.equal(torch.get_rng_state(), state)
        torch.set_rng_state(state)
        found = _plain(model, support, query, order, steps, by_step)
    if drawn or torch.allclose(found.loss, by_task.loss, rtol=1e-12):
        return found
    model.load_state_dict(other.state_dict())
    return by_task


def _plain(model, support, query, order, steps, calls):
    """With the calls ``(step, task)`` of the model in this order; the last step is the query set's."""
    params = dict(model.named_parameters())
    tasks = [dict(params) for _ in range(TASKS)]
    losses = [torch.empty(0)] * TASKS
    support_losses = []
    for step, index in calls:
        own = tasks[index]
        if step == steps:
            losses[index] = loss_fn(at(model, own), task(query, index))
            continue
        loss = loss_fn(at(model, own), task(support, index))
        support_losses.append(loss.detach())
        grads = torch.autograd.grad(loss, list(own.values()), create_graph=order == 2, materialize_grads=True)
        tasks[index] = {name: p - LR * g.to_dense() for (name, p), g in zip(own.items(), grads, strict=True)}
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return Plain(
        loss.detach(),
        support_losses,
        {name: gradient.to_dense() for name, gradient in zip(params, gradients, strict=True)},
        {name: torch.stack([own[name].detach() for own in tasks]) for name in params},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
    )


def examine(case: Case, findings: Findings, capture: tuple[int, ...] = (1, 2)) -> None:
    """Compares a case in the default mode and captured.

    Args:
        capture: the orders that are captured.
    """
    calls = batches(case)
    calls = [(calls[0], calls[1]), (calls[2], calls[3])]
    found = _differentiable(case, calls[0], findings)
    if found is None:
        return
    model, orders, random = found
    for order in orders:
        seed = int(torch.randint(2**31, ()))
        reference = copy.deepcopy(model)
        expected = []
        for number, (support, query) in enumerate(calls):
            torch.manual_seed(seed + number)
            expected.append(plain(reference, support, query, order))
        if not all(wanted.finite for wanted in expected):
            findings.counts["not finite in torch"] += 1
            return
        for mode in ("default", *(("capture",) if order in capture else ())):
            where = f"{case.name}, {mode}, order {order}"
            options = {"task_batching": "loop"} if random else {}
            meta = metafast.MAML(
                copy.deepcopy(model), loss_fn, inner=SGD(lr=LR), steps=STEPS, order=order,
                capture=mode == "capture", **options,
            )  # fmt: skip
            with _loops() as looped:
                outcome = _compared(meta, calls, expected, seed, where, findings)
                if outcome == "equal" and order == 1:
                    outcome = _adapts(
                        model, [support for support, _ in calls], seed, where, findings, meta.capture, options
                    )
            if outcome == "equal" and looped and not random:
                outcome = "equal, as a loop"
            findings.counts[f"{mode}: {outcome}"] += 1


def _differentiable(case, call, findings):
    """A model of the case, the orders that torch can differentiate it to, and whether it draws random numbers."""
    error = None
    # A target may have no derivative.
    for scaled in (99, 1):
        model = model_of(case, scaled)
        orders = []
        for order in (1, 2):
            try:
                torch.manual_seed(0)
                state = torch.get_rng_state()
                first = plain(copy.deepcopy(model), *call, order)
                random = not torch.equal(torch.get_rng_state(), state)
                if random:
                    # What draws random numbers may not use them.
                    torch.manual_seed(1)
                    random = not torch.equal(plain(copy.deepcopy(model), *call, order).loss, first.loss)
            except Exception as raised:
                error = raised
                break
            if not first.finite:
                findings.counts["not finite in torch"] += 1
                return None
            orders.append(order)
        if orders:
            if len(orders) == 1:
                findings.counts[f"torch has no second derivative: {str(error).splitlines()[0][:90]}"] += 1
            return model, orders, random
    findings.counts[f"torch does not differentiate it: {case.name}: {str(error).splitlines()[0][:90]}"] += 1
    return None


def _compared(meta, calls, expected, seed, where, findings):
    try:
        for number, (call, wanted) in enumerate(zip(calls, expected, strict=True)):
            torch.manual_seed(seed + number)
            meta.zero_grad()
            loss = meta(*call)
            loss.backward()
            params = dict(meta.model.named_parameters())
            gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for n, p in params.items()}
            problem = (
                difference({"loss": loss.detach()}, {"loss": wanted.loss})
                or difference(gradients, wanted.gradients, "gradient of ")
                or difference(dict(meta.model.named_buffers()), wanted.buffers, "buffer ")
            )
            if problem is not None:
                findings.wrong.append(f"{where}, call {number + 1}: {problem}")
                return "different"
    except NotRecordableError as error:
        findings.refused[where] = str(error)
        return "refused"
    except Exception as error:
        findings.wrong.append(f"{where}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
        return "error"
    return "equal"


def _adapts(model, supports, seed, where, findings, capture, options):
    """The same for ``adapt``, and for what the adapted models give."""
    before = dict(copy.deepcopy(model).named_parameters()) | dict(copy.deepcopy(model).named_buffers())
    meta = metafast.MAML(
        copy.deepcopy(model), loss_fn, inner=SGD(lr=LR), steps=STEPS, order=1, capture=capture, **options
    )
    try:
        for number, support in enumerate(supports):
            reference = copy.deepcopy(model)
            wanted = _seeded(seed + number, lambda: plain(reference, support, support, 1))  # noqa: B023
            learners = _seeded(seed + number, lambda: meta.adapt(support))  # noqa: B023
            if meta.tasks_per_chunk == 1:
                # Its outputs depend on its calls before: every task starts from the model as it is.
                wanted.adapted = _each_from_the_start(model, support)
            buffers = dict(meta.model.named_buffers())
            # Looking rows up under a bound of their norms changes the shared parameters themselves, so that other tasks
            # see it too; what is looked up is the same.
            changes = any(not torch.equal(before[name], p) for name, p in reference.named_parameters())
            problem = (None if changes else difference(learners.params, wanted.adapted, "adapted ")) or difference(
                buffers, {name: before[name] for name in buffers}, "buffer after adapt "
            )
            if problem is None:
                problem = _outputs_differ(learners, model, wanted.adapted, support, seed)
                # In training mode the call changed them, as a call of the model does.
                for name, buffer in buffers.items():
                    buffer.copy_(before[name])
            if problem is not None:
                findings.wrong.append(f"{where}, adapt {number + 1}: {problem}")
                return "different"
            if changes:
                break
    except NotRecordableError as error:
        findings.refused[f"{where}, adapt"] = str(error)
        return "refused"
    except Exception as error:
        findings.wrong.append(f"{where}, adapt: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
        return "error"
    return "equal"


def _each_from_the_start(model, support):
    tasks = [
        adaptation(copy.deepcopy(model), loss_fn, task(support, index), STEPS, LR, create_graph=False)[-1]
        for index in range(TASKS)
    ]
    return {name: torch.stack([own[name].detach() for own in tasks]) for name in tasks[0]}


def _outputs_differ(learners, model, adapted, inputs, seed):
    torch.manual_seed(seed)
    found = learners(*inputs)
    torch.manual_seed(seed)
    reference = copy.deepcopy(model)
    # Torch's inference path, which learners never take, writes zeros at padded positions; the others are equal.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tasks = [
            at(reference, {name: p[index].clone() for name, p in adapted.items()})(*task(inputs, index))
            for index in range(TASKS)
        ]
    torch.backends.mha.set_fastpath_enabled(fast)
    return difference(
        dict(enumerate(found)), dict(enumerate(torch.stack(column) for column in zip(*tasks, strict=True))), "output "
    )


def _seeded(seed, function):
    torch.manual_seed(seed)
    return function()


def difference(found, expected, what=""):
    """The first of these tensors, by name, that is off by more than the tolerance, in words; None without one.

    A tensor may be 0 but for rounding, so a part of the greatest one's norm counts too.
    """
    if found.keys() != expected.keys():
        return f"{what}: names {sorted(found.keys() ^ expected.keys())}"
    greatest = max((x.double().norm() for x in expected.values()), default=0.0)
    for name, wanted in expected.items():
        value = found[name].detach()
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            return f"{what}{name}: {value.dtype} {tuple(value.shape)}, expected {wanted.dtype} {tuple(wanted.shape)}"
        off, norm = (value.double() - wanted.double()).norm(), wanted.double().norm()
        if not off <= TOLERANCE * (norm + 1e-3 * greatest) + 1e-12:
            return f"{what}{name}: off by {off:.1e} of {norm:.1e}"
    return None


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "one after another" in record.getMessage():
            self.messages.append(record.getMessage())


@contextmanager
def _loops() -> Iterator[list[str]]:
    """The reasons for which tasks ran as a loop inside."""
    logger, heard = logging.getLogger("metafast"), _Heard()
    logger.addHandler(heard)
    try:
        yield heard.messages
    finally:
        logger.removeHandler(heard)
