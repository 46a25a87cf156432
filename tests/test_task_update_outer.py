"""Outer updates against their formulas: Reptile's step, means over tasks, moving averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metafast.backend import BackendUnavailableError
from metafast.ops.task_update import moving_average, reptile_update, task_mean

TASKS = 3
SHAPES = [(40, 33), (5,), (0, 2), (), (70_001,)]
BACKENDS = ["fused", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randoms(seed: int, *tasks: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((*tasks, *shape), dtype=torch.float64, generator=generator).to(dtype) for shape in SHAPES]


def assert_rounded_once(actual: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(actual, exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=torch.finfo(dtype).eps, atol=4 * 2**-24)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reptile(weighted: bool, reduction: str, dtype: torch.dtype, backend: str) -> None:
    params, adapted = randoms(0, dtype=dtype), randoms(1, TASKS, dtype=dtype)
    weights = torch.tensor([0.5, 1.0, 2.0]) if weighted else None
    found = reptile_update(params, adapted, 0.1, reduction=reduction, weights=weights, backend=backend)
    w = torch.ones(TASKS).double() if weights is None else weights.double()
    w = w / w.sum() if reduction == "mean" else w
    exact = [
        p.double() + 0.1 * torch.tensordot(w, a.double() - p.double(), 1) for p, a in zip(params, adapted, strict=True)
    ]
    assert_rounded_once(found, exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reptile_stays_where_tasks_stay(backend: str) -> None:
    params = randoms(0, dtype=torch.float32)
    found = reptile_update(params, [p.expand(TASKS, *p.shape) for p in params], 0.3, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(found, params, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_mean(weighted: bool, dtype: torch.dtype, backend: str) -> None:
    tensors, weights = randoms(1, TASKS, dtype=dtype), torch.tensor([0.5, 1.0, 2.0]) if weighted else None
    w = torch.ones(TASKS).double() if weights is None else weights.double()
    exact = [torch.tensordot(w / w.sum(), x.double(), 1) for x in tensors]
    assert_rounded_once(task_mean(tensors, weights, backend=backend), exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_average(dtype: torch.dtype, backend: str) -> None:
    averages, params = randoms(0, dtype=dtype), randoms(1, dtype=dtype)
    exact = [0.9 * a.double() + 0.1 * p.double() for a, p in zip(averages, params, strict=True)]
    assert_rounded_once(moving_average(averages, params, 0.9, backend=backend), exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_in_place_equals_out_of_place(contiguous: bool, backend: str) -> None:
    params, adapted = randoms(0), randoms(1, TASKS)
    if not contiguous:
        params[0] = params[0].t().contiguous().t()
        adapted[0] = adapted[0].transpose(1, 2).contiguous().transpose(1, 2)
    expected = reptile_update(params, adapted, 0.1, backend=backend)
    found = reptile_update(params, adapted, 0.1, inplace=True, backend=backend)
    assert all(one is other for one, other in zip(found, params, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    named = dict(zip("abcde", params, strict=True))
    other = dict(zip("edcba", randoms(2)[::-1], strict=True))
    averaged = moving_average(named, other, 0.9, backend=backend)
    assert list(averaged) == list("abcde")
    moving_average(named, other, 0.9, inplace=True, backend=backend)
    assert all(torch.equal(averaged[name], named[name]) for name in named)


def test_a_gradient_goes_through_the_plain_formula() -> None:
    params, adapted = randoms(0)[:2], [a.requires_grad_() for a in randoms(1, TASKS)[:2]]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(reptile_update(params, list(values), 0.1))

    assert torch.autograd.gradcheck(call, adapted)
    with pytest.raises(BackendUnavailableError, match="outer updates have no derivatives"):
        reptile_update(params, adapted, 0.1, backend="fused")
    with pytest.raises(ValueError, match="inplace: expected tensors that require no gradient"):
        reptile_update(params, adapted, 0.1, inplace=True)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    tensors, found = randoms(0, TASKS, dtype=torch.float32), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(task_mean(tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_ops_are_registered_as_they_behave() -> None:
    params, adapted, weights = randoms(0), randoms(1, TASKS), torch.ones(TASKS)
    reptile_update(params, adapted, 0.1)  # the kernels are there once they were asked for
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.metafast.outer_update.default, (params, adapted, [], 0.1), test_utils=tests)
    torch.library.opcheck(torch.ops.metafast.outer_update.default, ([], adapted, [weights], 0.1), test_utils=tests)
    torch.library.opcheck(torch.ops.metafast.outer_update_.default, (params, adapted, [], 0.1), test_utils=tests)
    given = [torch.full_like(p, torch.nan) for p in params]
    torch.ops.metafast.outer_update.out(params, adapted, [weights], 0.1, out0=given)
    for found, expected in zip(given, torch.ops.metafast.outer_update(params, adapted, [weights], 0.1), strict=True):
        assert torch.equal(found, expected)


P, A = torch.ones(4), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "adapted: expected a list, tuple or dict", lambda: reptile_update([P], A, 0.1)),
        (
            ValueError,
            "reduction: expected 'mean' or 'sum', got 'max'",
            lambda: reptile_update([P], [A], 0.1, reduction="max"),
        ),
        (ValueError, r"params.0.: expected shape .3,.*got .4,.", lambda: reptile_update([P], [A[:, 1:]], 0.1)),
        (
            ValueError,
            "adapted.0.: expected the same number of tasks, at least 1",
            lambda: reptile_update([P], [A[:0]], 0.1),
        ),
        (TypeError, "adapted: expected a container as", lambda: reptile_update([P], {"w": A}, 0.1)),
        (ValueError, "adapted: expected as many tensors", lambda: reptile_update([P], [A, A], 0.1)),
        (ValueError, r"weights: expected shape \(2,\)", lambda: task_mean([A], torch.ones(3))),
        (TypeError, "tensors.0.: expected a tensor, got int", lambda: task_mean([1])),
        (TypeError, "tensors.0.: expected float32", lambda: task_mean([A.long()])),
        (ValueError, "tensors: expected at least one tensor", lambda: task_mean([])),
        (ValueError, "decay: expected a number from 0 to 1, got 2", lambda: moving_average([P], [P], 2)),
        (ValueError, "averages.0.: expected shape .2, 4.", lambda: moving_average([P], [A], 0.9)),
    ],
)
def test_bad_input_is_named(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()
