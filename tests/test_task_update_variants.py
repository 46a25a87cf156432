"""Clipping and frozen parameters: what the task update does around a rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from metafast.inner import SGD, Adam, AdamW, RMSprop, Rule
from metafast.ops.task_update import task_update

TASKS = 3
SHAPES = [(4, 3), (5,), (0, 2), ()]
BACKENDS = ["fused", "reference"]
RULES = [
    SGD(0.1),
    SGD(0.1, momentum=0.9, weight_decay=0.1),
    Adam(0.1, amsgrad=True),
    AdamW(0.1),
    RMSprop(0.1, momentum=0.9, centered=True),
]


def randoms(seed: int, batched: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(TASKS, *shape) if batched else shape for shape in SHAPES]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def flat(updated: tuple[Any, dict[str, Any]]) -> list[Tensor]:
    return [*updated[0], *(tensor for group in updated[1].values() for tensor in group)]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_is_that_of_torch_for_each_task(backend: str) -> None:
    params, grads = randoms(0), [10 * g if i == 0 else g for i, g in enumerate(randoms(1))]
    grads[0][1:] *= 1e-3  # one task above the threshold, the others below
    for task in (1, 2):
        for grad in grads:
            grad[task] *= 0.1
    new, _ = task_update(SGD(1.0, clip_norm=2.0, clip_value=0.5), params, grads, backend=backend)
    assert any(grad.abs().max() > 0.5 for grad in grads if grad.numel())
    for task in range(TASKS):
        leaves = [torch.nn.Parameter(p[task].clone()) for p in params]
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad[task].clone()
        torch.nn.utils.clip_grad_norm_(leaves, 2.0)
        torch.nn.utils.clip_grad_value_(leaves, 0.5)
        expected = [(p[task] - leaf.grad) for p, leaf in zip(params, leaves, strict=True)]
        assert_equal([n[task] for n in new], expected)


@pytest.mark.parametrize("rule", [SGD(0.1, clip_norm=0.7), Adam(0.1, eps_root=1e-2, clip_norm=0.7, clip_value=0.2)])
def test_derivatives_of_clipping_equal_finite_differences(rule: Rule) -> None:
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(task_update(rule, tensors[:2], tensors[2:], backend="fused")[0])

    tensors = [tensor.requires_grad_() for tensor in (*randoms(0)[:2], *randoms(1)[:2])]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_of_clipping_are_finite_at_zero(backend: str) -> None:
    param, grad = torch.ones(TASKS, 4), torch.zeros(TASKS, 4, requires_grad=True)
    (new,), _ = task_update(SGD(1.0, clip_norm=1.0), [param], [grad], backend=backend)
    (first,) = torch.autograd.grad(new.sum(), grad, create_graph=True)
    torch.testing.assert_close(first, -torch.ones(TASKS, 4))
    (second,) = torch.autograd.grad(first.square().sum(), grad)
    torch.testing.assert_close(second, torch.zeros(TASKS, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_are_clipped_in_float32(dtype: torch.dtype) -> None:
    """Squares of 300 overflow in float16."""
    grad = torch.full((1, 64), 300.0, dtype=dtype)
    (new,), _ = task_update(SGD(1.0, clip_norm=8.0), [torch.zeros(1, 64, dtype=dtype)], [grad])
    torch.testing.assert_close(new, torch.full((1, 64), -1.0, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_frozen_parameters_are_handed_on(rule: Rule, backend: str) -> None:
    params = dict(zip("abcd", randoms(0, batched=False), strict=True))
    state: dict[str, dict[str, Tensor]] | None = None
    alone, alone_state = {"b": params["b"], "d": params["d"]}, None
    for step in range(3):
        grads = dict(zip("abcd", randoms(10 + step), strict=True))
        given = {name: None if name in "ac" else grad for name, grad in reversed(grads.items())}
        before = params
        params, state = task_update(rule, params, given, state, step=step, backend=backend)
        few = {name: grads[name] for name in "bd"}
        alone, alone_state = task_update(rule, alone, few, alone_state, step=step, backend=backend)
        assert list(params) == list("abcd")
        assert params["a"] is before["a"]
        assert params["c"] is before["c"]
        assert_equal([params["b"], params["d"]], list(alone.values()), 0)
        for name, group in state.items():
            assert group["a"] is None
            assert_equal([group["b"], group["d"]], list(alone_state[name].values()), 0)


def test_all_parameters_may_be_frozen() -> None:
    params = randoms(0)
    new, state = task_update(Adam(0.1), params, [None] * len(params))
    assert all(one is other for one, other in zip(new, params, strict=True))
    assert state == {"exp_avg": [None] * len(params), "exp_avg_sq": [None] * len(params)}


def test_a_state_for_what_is_not_frozen_is_asked_for() -> None:
    state = {"momentum_buffer": [None, None]}
    with pytest.raises(TypeError, match=r"state\['momentum_buffer'\]\[1\]: expected a tensor, got NoneType"):
        task_update(SGD(0.1, momentum=0.9), randoms(0)[:2], [None, randoms(0)[1]], state, step=1)


def test_rules_are_compared_with_their_clipping() -> None:
    assert SGD(0.1) != dataclasses.replace(SGD(0.1), clip_norm=1.0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_cotangents_and_tangents_that_are_missing_are_zeros(rule: Rule) -> None:
    """Of the last step's state nothing follows; a tangent may be given for one tensor alone."""
    params, grads = randoms(0)[:2], [g.requires_grad_() for g in randoms(1)[:2]]
    found = []
    for backend in BACKENDS:
        _, state = task_update(rule, params, randoms(2)[:2], backend=backend)
        state = {name: [t.requires_grad_() for t in group] for name, group in state.items()} or None
        leaves = [*grads, *(t for group in (state or {}).values() for t in group)]
        new, after = task_update(rule, params, grads, state, step=1, backend=backend)
        products = [*torch.autograd.grad(new[0].sin().sum(), leaves, materialize_grads=True, retain_graph=True)]
        for group in after.values():
            products += torch.autograd.grad(group[1].sin().sum(), leaves, materialize_grads=True, retain_graph=True)
        products += torch.autograd.grad(new[1].sin().sum(), leaves, materialize_grads=True, create_graph=True)

        def one(first: Tensor, state: Any = state, backend: str = backend) -> tuple[Tensor, ...]:
            return tuple(flat(task_update(rule, params, [first, grads[1]], state, step=1, backend=backend)))

        products += torch.func.jvp(one, (grads[0].detach(),), (grads[0].detach().cos(),))[1]
        found.append([p.detach() for p in products])
    assert_equal(found[0], found[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_tasks_a_shared_parameter_and_a_rate_get_zeros(backend: str) -> None:
    """Of a parameter that is longer than what a kernel sums at a time."""
    param, lr = torch.randn(20_000, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    (new,), _ = task_update(SGD(0.1), [param], [torch.randn(0, 20_000)], rates={"lr": lr}, backend=backend)
    for leaf, product in zip((param, lr), torch.autograd.grad(new.sum(), (param, lr)), strict=True):
        torch.testing.assert_close(product, torch.zeros_like(leaf))
