"""The task update against torch.optim, autograd through its formulas, and finite differences."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import types
import weakref
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from some_cases import half
from torch import Tensor

from metafast.backend import BackendUnavailableError, use_backend
from metafast.inner import SGD, Adam, AdamW, RMSprop, Rule
from metafast.ops.task_update import library, only_derivatives, task_update
from metafast.testing import relative_error

Shapes = Sequence[tuple[int, ...]]

TASKS = 3
SHAPES: Shapes = [(5, 7), (700,), (), (0, 4), (2, 3, 2)]
SHARED = [True, False, True, False, False]
RULES = [
    SGD(0.1),
    SGD(0.1, weight_decay=0.2, maximize=True),
    SGD(0.1, momentum=0.9),
    SGD(0.1, momentum=0.9, dampening=0.3, weight_decay=0.2),
    SGD(0.1, momentum=0.9, nesterov=True),
    SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.2, maximize=True),
    Adam(0.1),
    Adam(0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, maximize=True),
    Adam(0.1, betas=(0.8, 0.95), weight_decay=0.2, amsgrad=True),
    AdamW(0.1, betas=(0.8, 0.95)),
    AdamW(0.1, weight_decay=0.2, amsgrad=True),
    RMSprop(0.1),
    RMSprop(0.1, alpha=0.8, eps=1e-3, weight_decay=0.2, maximize=True),
    RMSprop(0.1, alpha=0.8, momentum=0.9),
    RMSprop(0.1, alpha=0.8, centered=True),
    RMSprop(0.1, alpha=0.8, momentum=0.9, centered=True, weight_decay=0.2),
]
OTHERS = [Adam(0.1, betas=(0.8, 0.9), eps_root=1e-2), RULES[8], RULES[9], RULES[15]]
FEW_RULES = [RULES[0], RULES[3], RULES[5], *OTHERS]
RATES = ["numbers", "one", "a tensor", "a parameter", "mixed"]
BACKENDS = ["fused", "reference"]


def randoms(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


class Call:
    """A call of the op as a function of all its tensors, in one flat tuple."""

    def __init__(
        self,
        rule: Rule,
        rates: str = "numbers",
        first: bool = False,
        shapes: Shapes = SHAPES,
        shared: Sequence[bool] = SHARED,
        dtype: torch.dtype = torch.float64,
        from_zero: float = 2.0,
        tasks: int = TASKS,
    ) -> None:
        self.rule = rule
        self.count = len(shapes)
        self.states = () if first else rule.state_names
        self.step = 0 if first else 2
        self.rates = rates
        mixed = [shape if i % 2 else () for i, shape in enumerate(shapes)]
        sizes = {"numbers": [], "one": [()], "a tensor": [()] * self.count, "a parameter": shapes, "mixed": mixed}[
            rates
        ]
        rows = [(tasks, *shape) for shape in shapes]
        params = [shape if one else row for shape, row, one in zip(shapes, rows, shared, strict=True)]
        self.tensors = randoms([*params, *rows, *rows * len(self.states), *sizes, *sizes], 0, dtype)
        # Adam and RMSprop divide the gradient by its magnitude: the derivative of g / |g| is the difference of numbers as
        # large as 1 / |g|, and near 0 autograd loses digits. Gradients stay away from 0, decay included.
        count = self.count
        self.tensors[count : 2 * count] = [g + from_zero * g.sign() for g in self.tensors[count : 2 * count]]
        rates_from = (2 + len(self.states)) * count
        self.tensors[rates_from:] = [0.1 * rate.abs() for rate in self.tensors[rates_from:]]

    def leaves(self) -> list[Tensor]:
        return [tensor.clone().requires_grad_() for tensor in self.tensors]

    def arguments(self, flat: Sequence[Tensor]) -> tuple[Any, ...]:
        """params, grads, state, rates"""
        sizes = range(0, (2 + len(self.states)) * self.count, self.count)
        params, grads, *states = [list(flat[i : i + self.count]) for i in sizes]
        state = dict(zip(self.states, states, strict=True))
        for name in state:
            # Averages of squares are above 0, and above the square of the average.
            if name.endswith(("_sq", "square_avg")):
                averages = state.get("grad_avg", [0] * self.count)
                state[name] = [x * x + 0.1 + a * a for x, a in zip(state[name], averages, strict=True)]
        rest = flat[(2 + len(states)) * self.count :]
        lrs, decays = list(rest[: len(rest) // 2]), list(rest[len(rest) // 2 :])
        rates: dict[str, Any] | None = {"lr": lrs, "weight_decay": decays} if lrs else None
        if self.rates == "one":
            rates = {"lr": lrs[0], "weight_decay": decays[0]}
        return params, grads, state or None, rates

    def __call__(self, *flat: Tensor, backend: str = "fused") -> tuple[Tensor, ...]:
        params, grads, state, rates = self.arguments(flat)
        new_params, new_state = task_update(
            self.rule, params, grads, state, rates=rates, step=self.step, backend=backend
        )
        return (*new_params, *(buffer for buffers in new_state.values() for buffer in buffers))

    def formula(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """The algorithm as the documentation of torch.optim states it."""
        params, grads, state, rates = self.arguments(flat)
        new_params: list[Tensor] = []
        new_state: dict[str, list[Tensor]] = {name: [] for name in self.rule.state_names}
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            lr, decay = self.rule.lr, self.rule.weight_decay  # type: ignore[attr-defined]
            if rates is not None:
                lr, decay = (rate if isinstance(rate, Tensor) else rate[i] for rate in rates.values())
            old = {name: None if state is None else state[name][i] for name in self.rule.state_names}
            new_param, new = FORMULAS[type(self.rule)](self.rule, self.step + 1, param, grad, old, lr, decay)
            new_params.append(new_param)
            for name, tensor in new.items():
                new_state[name].append(tensor)
        return (*new_params, *(tensor for group in new_state.values() for tensor in group))


State = dict[str, Any]


def sgd_formula(
    rule: Any, t: int, param: Tensor, grad: Tensor, old: State, lr: Any, decay: Any
) -> tuple[Tensor, State]:
    grad = (-grad if rule.maximize else grad) + decay * param
    if not rule.momentum:
        return param - lr * grad, {}
    before = old["momentum_buffer"]
    buffer = grad if before is None else rule.momentum * before + (1 - rule.dampening) * grad
    step = grad + rule.momentum * buffer if rule.nesterov else buffer
    return param - lr * step, {"momentum_buffer": buffer}


def adam_formula(
    rule: Any, t: int, param: Tensor, grad: Tensor, old: State, lr: Any, decay: Any
) -> tuple[Tensor, State]:
    grad = -grad if rule.maximize else grad
    if rule.decoupled:
        param = param - lr * decay * param
    else:
        grad = grad + decay * param
    beta1, beta2 = rule.betas
    m = beta1 * (0 if old["exp_avg"] is None else old["exp_avg"]) + (1 - beta1) * grad
    v = beta2 * (0 if old["exp_avg_sq"] is None else old["exp_avg_sq"]) + (1 - beta2) * grad**2
    new = {"exp_avg": m, "exp_avg_sq": v}
    if rule.amsgrad:
        before = 0 * v if old["max_exp_avg_sq"] is None else old["max_exp_avg_sq"]
        v = new["max_exp_avg_sq"] = torch.maximum(before, v) if isinstance(v, Tensor) else max(before, v)
    return param - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t) + rule.eps_root).sqrt() + rule.eps), new


def rmsprop_formula(
    rule: Any, t: int, param: Tensor, grad: Tensor, old: State, lr: Any, decay: Any
) -> tuple[Tensor, State]:
    grad = (-grad if rule.maximize else grad) + decay * param
    old = {name: 0 if tensor is None else tensor for name, tensor in old.items()}
    v = rule.alpha * old["square_avg"] + (1 - rule.alpha) * grad**2
    new, variance = {"square_avg": v}, v
    if rule.centered:
        average = rule.alpha * old["grad_avg"] + (1 - rule.alpha) * grad
        variance = v - average**2
    step = grad / (variance.sqrt() + rule.eps)
    if rule.momentum:
        step = new["momentum_buffer"] = rule.momentum * old["momentum_buffer"] + step
    return param - lr * step, {**new, **({"grad_avg": average} if rule.centered else {})}


FORMULAS: dict[type[Rule], Callable[..., tuple[Tensor, State]]] = {
    SGD: sgd_formula,
    Adam: adam_formula,
    AdamW: adam_formula,
    RMSprop: rmsprop_formula,
}


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_steps_equal_torch_optim(rule: Rule, backend: str) -> None:
    start = randoms(SHAPES, 1)
    gradients = [randoms([(TASKS, *shape) for shape in SHAPES], 10 + step) for step in range(4)]
    params, state = start, None
    for step, grads in enumerate(gradients):
        params, state = task_update(rule, params, grads, state, step=step, backend=backend)
    options = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if not f.kw_only}
    options.pop("eps_root", None)  # torch has none: 0
    for task in range(TASKS):
        expected = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = getattr(torch.optim, type(rule).__name__)(expected, **options)
        for grads in gradients:
            for param, grad in zip(expected, grads, strict=True):
                param.grad = grad[task].clone()
            optimizer.step()
        assert_equal([param[task] for param in params], [param.detach() for param in expected])
        assert state is not None
        assert tuple(state) == rule.state_names
        for name, group in state.items():
            # Of a parameter without elements torch.optim has a state too.
            assert_equal([tensor[task] for tensor in group], [optimizer.state[param][name] for param in expected])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_vjp_equals_autograd_through_the_formula(rule: Rule, rates: str, backend: str) -> None:
    for first in (True, False):
        call = Call(rule, rates, first)
        leaves = call.leaves()
        outputs, expected = call(*leaves, backend=backend), call.formula(*leaves)
        assert_equal(outputs, expected)
        cotangents = randoms([tuple(output.shape) for output in outputs], 9)
        products = torch.autograd.grad(outputs, leaves, cotangents)
        assert_equal(products, torch.autograd.grad(expected, leaves, cotangents))


def norm_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm()) if expected.any() else float(actual.norm())


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_any_inputs_give_autograds_result_to_1e_12(rule: Rule, rates: str) -> None:
    for first in (True, False):
        call = Call(rule, rates, first, from_zero=0.0)
        leaves = call.leaves()
        outputs, expected = call(*leaves), call.formula(*leaves)
        cotangents = randoms([tuple(output.shape) for output in outputs], 9)
        found = [[*o, *torch.autograd.grad(o, leaves, cotangents)] for o in (outputs, expected)]
        # The first step of Adam and RMSprop is g / |g|: there autograd's derivative is rounding, see below.
        count = len(outputs) if first and not isinstance(rule, SGD) else None
        for one, other in zip(found[0][:count], found[1][:count], strict=True):
            assert norm_error(one.detach(), other.detach()) <= 1e-12


@pytest.mark.parametrize("rule", [rule for rule in RULES if not isinstance(rule, SGD)], ids=str)
def test_any_inputs_give_the_exact_product_to_1e_12(rule: Any) -> None:
    """Against differences of the formula in decimals of 80 digits: autograd through it is no judge, it differs by 1e-11."""
    given = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if not f.kw_only}
    numbers = types.SimpleNamespace(**{k: Decimal(v) if isinstance(v, float) else v for k, v in given.items()})
    if isinstance(rule, Adam):
        numbers.betas = [Decimal(beta) for beta in rule.betas]
        numbers.decoupled = rule.decoupled

    for first in (True, False):
        call = Call(rule, "a parameter", first, shapes=[(6,)], shared=[False], from_zero=0.0)
        call.tensors[1][0] *= 1e-3
        params, grads, state, rates = call.arguments(call.tensors)
        leaves = [x.clone().requires_grad_() for x in (*params, *grads, *(x for (x,) in (state or {}).values()))]
        lr, decay = (rate[0].clone().requires_grad_() for rate in rates.values())
        before = {name: [x] for name, x in zip(call.states, leaves[2:], strict=True)} or None
        (new,), after = task_update(
            rule, leaves[:1], leaves[1:2], before, rates={"lr": [lr], "weight_decay": [decay]}, step=call.step
        )
        outputs = [new, *(x for (x,) in after.values())]
        cotangents = randoms([tuple(x.shape) for x in outputs], 9)
        products = torch.autograd.grad(outputs, [*leaves, lr, decay], cotangents)

        def results(values: list[Decimal], first: bool = first, step: int = call.step) -> list[Decimal]:
            param, grad, *states, lr, decay = values
            old = dict.fromkeys(rule.state_names) if first else dict(zip(rule.state_names, states, strict=True))
            new, after = FORMULAS[type(rule)](numbers, step + 1, param, grad, old, lr, decay)  # type: ignore[arg-type]
            return [new, *after.values()]  # type: ignore[list-item]

        with localcontext() as context:
            context.prec = 80
            h = Decimal("1e-25")
            exact = [torch.zeros_like(x) for x in products]
            for at in itertools.product(range(TASKS), range(6)):
                place = [Decimal((x[at] if x.dim() > 1 else x[at[1]]).item()) for x in (*leaves, lr, decay)]
                weights = [Decimal(c[at].item()) for c in cotangents]
                for k, into in enumerate(exact):
                    above, below = (results([*place[:k], place[k] + d, *place[k + 1 :]]) for d in (h, -h))
                    slopes = [(a - b) / (2 * h) for a, b in zip(above, below, strict=True)]
                    slope = sum((w * s for w, s in zip(weights, slopes, strict=True)), Decimal(0))
                    into[at if into.dim() > 1 else at[1]] += float(slope)
        for one, other in zip(products, exact, strict=True):
            assert norm_error(one, other) <= 1e-12


@pytest.mark.parametrize(
    ("rule", "rates"), half(itertools.product(FEW_RULES, ["numbers", "one", "a parameter"])), ids=str
)
def test_derivatives_equal_finite_differences(rule: Rule, rates: str) -> None:
    call = Call(rule, rates, shapes=[(2,), (0,), ()], shared=[True, False, False], tasks=2)
    assert torch.autograd.gradcheck(call, call.leaves(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, call.leaves(), check_fwd_over_rev=True)


Function = Callable[..., tuple[Tensor, ...]]


def gradient(function: Function) -> Function:
    def scalar(*x: Tensor) -> Tensor:
        return torch.stack([(output**3).sum() for output in function(*x)]).sum()

    return lambda *x: torch.func.grad(scalar, tuple(range(len(x))))(*x)


def directional(function: Function) -> Function:
    return lambda *x: torch.func.jvp(function, x, tuple(each.cos() for each in x))[1]


def mapped(function: Function) -> Function:
    return lambda *x: torch.func.vmap(function)(*(torch.stack([each, each.sin()]) for each in x))


def mapped_over_one(function: Function) -> Function:
    return lambda x, *rest: torch.func.vmap(lambda one: function(one, *rest), in_dims=1)(torch.stack([x, x.sin()], 1))


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": gradient,
    "grad of grad": lambda function: gradient(gradient(function)),
    "jvp": directional,
    "jvp of grad": lambda function: directional(gradient(function)),
    "grad of jvp": lambda function: gradient(directional(function)),
    "vmap": mapped,
    "vmap over one": mapped_over_one,
    "vmap of grad": lambda function: mapped(gradient(function)),
    "grad of vmap": lambda function: gradient(mapped(function)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rates", ["numbers", "one", "mixed"])
@pytest.mark.parametrize("rule", FEW_RULES, ids=str)
def test_func_transforms_equal_those_of_the_formula(rule: Rule, rates: str, transform: str) -> None:
    call = Call(rule, rates, shapes=[(4,), (2, 3)], shared=[True, False])
    transformed = TRANSFORMS[transform]
    assert_equal(transformed(call)(*call.tensors), transformed(call.formula)(*call.tensors), 1e-10)


@pytest.mark.parametrize("rule", [RULES[0], RULES[3]], ids=str)
def test_containers_keep_type_and_keys(rule: Rule) -> None:
    params, grads, _, rates = Call(rule, "mixed").arguments(Call(rule, "mixed").tensors)
    lrs = rates["lr"]
    names = ["e", "d", "c", "b", "a"]
    listed, listed_state = task_update(rule, params, grads, rates={"lr": lrs})
    tupled, tupled_state = task_update(rule, tuple(params), tuple(grads), rates={"lr": tuple(lrs)})
    named, named_state = task_update(
        rule,
        dict(zip(names, params, strict=True)),
        dict(sorted(zip(names, grads, strict=True))),
        rates={"lr": dict(sorted(zip(names, lrs, strict=True)))},
    )
    assert (type(listed), type(tupled), type(named), list(named)) == (list, tuple, dict, names)
    assert_equal(tupled, listed, 0)
    assert_equal(list(named.values()), listed, 0)
    assert (
        list(listed_state) == list(tupled_state) == list(named_state) == (["momentum_buffer"] if rule.momentum else [])
    )
    for name, buffers in listed_state.items():
        assert (type(buffers), type(tupled_state[name]), list(named_state[name])) == (list, tuple, names)
        assert_equal(list(named_state[name].values()), buffers, 0)


def scattered(tensor: Tensor) -> Tensor:
    """The same numbers, every second one of a larger tensor whose dimensions lie in reverse."""
    wide = tensor.new_full([2 * size for size in reversed(tensor.shape)], torch.nan)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


@pytest.mark.parametrize("rates", ["numbers", "a parameter"])
@pytest.mark.parametrize("rule", [RULES[3], *OTHERS], ids=str)
def test_non_contiguous_inputs(rule: Rule, rates: str) -> None:
    call = Call(rule, rates, shapes=[(4, 6), (5,), (3, 4)], shared=[True, False, False])
    leaves = call.leaves()
    changed = [scattered(tensor).requires_grad_() for tensor in call.tensors]
    assert not any(tensor.is_contiguous() for tensor in changed)
    outputs, expected = call(*changed), call(*leaves)
    assert_equal(outputs, expected, 0)
    cotangents = [scattered(tensor) for tensor in randoms([tuple(output.shape) for output in outputs], 9)]
    assert_equal(
        torch.autograd.grad(outputs, changed, cotangents), torch.autograd.grad(expected, leaves, cotangents), 0
    )


def test_parameters_expanded_over_tasks_are_as_shared_ones() -> None:
    rule = RULES[3]
    param, grad = randoms([(4, 6), (TASKS, 4, 6)], 0)
    shared, expanded = param.clone().requires_grad_(), param.clone().requires_grad_()
    outputs = [task_update(rule, [p], [grad])[0][0] for p in (shared, expanded.expand(TASKS, 4, 6))]
    assert_equal(outputs[:1], outputs[1:], 0)
    gradients = [torch.autograd.grad(out.cos().sum(), p)[0] for out, p in zip(outputs, (shared, expanded), strict=True)]
    assert_equal(gradients[:1], gradients[1:])


@pytest.mark.parametrize("shape", [(0, 3), (TASKS, 0)])
def test_no_tasks_and_no_elements(shape: tuple[int, ...]) -> None:
    param, lr = torch.ones(shape[1:], requires_grad=True), torch.ones((), requires_grad=True)
    (new,), _ = task_update(SGD(0.1), [param], [torch.ones(shape)], rates={"lr": lr}, backend="fused")
    assert new.shape == shape
    new.sum().backward()
    assert_equal([param.grad, lr.grad], [torch.zeros(shape[1:]), torch.zeros(())], 0)  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rates", ["numbers", "mixed"])
def test_lower_precisions_round_once(rates: str, dtype: torch.dtype) -> None:
    """Exact arithmetic on the same numbers, rounded at the end, to one unit in the last place of each result's sums."""
    call = Call(RULES[3], rates, dtype=dtype)
    leaves, exact = call.leaves(), [tensor.double().requires_grad_() for tensor in call.tensors]
    outputs, expected = call(*leaves), call.formula(*exact)
    cotangents = randoms([tuple(output.shape) for output in outputs], 9, dtype)
    products = torch.autograd.grad(outputs, leaves, cotangents)
    exact_products = torch.autograd.grad(expected, exact, [cotangent.double() for cotangent in cotangents])
    for one, other in zip((*outputs, *products), (*expected, *exact_products), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rates", ["numbers", "mixed"])
@pytest.mark.parametrize("rule", OTHERS, ids=str)
def test_lower_precisions_equal_the_reference(rule: Rule, rates: str, dtype: torch.dtype) -> None:
    """Against exact arithmetic on the same numbers the error is at most twice the reference's, or a rounding."""
    call = Call(rule, rates, dtype=dtype)
    exact = Call(rule, rates)
    exact.tensors = [tensor.double() for tensor in call.tensors]
    found = []
    for one, backend in ((exact, "reference"), (call, "reference"), (call, "fused")):
        leaves = one.leaves()
        outputs = one(*leaves, backend=backend)
        cotangents = randoms([tuple(output.shape) for output in outputs], 9, dtype)
        products = torch.autograd.grad(
            outputs, leaves, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
        )
        found.append([torch.cat([tensor.flatten() for tensor in group]) for group in (outputs, products)])
    for true, reference, fused in zip(*found, strict=True):
        assert fused.dtype == dtype
        assert relative_error(fused, true) <= max(2 * relative_error(reference, true), torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rates", ["numbers", "a parameter"])
@pytest.mark.parametrize("rule", RULES[6:], ids=str)
def test_derivatives_where_nothing_was_seen_are_limits(rule: Rule, rates: str, backend: str) -> None:
    """Rows of an embedding that no example uses: gradient and state are 0. The limit is that of tiny gradients."""
    rule = dataclasses.replace(rule, weight_decay=0.0, eps=1e-3)  # type: ignore[call-arg]
    for first in (True, False):
        call = Call(rule, rates, first, shapes=[(2, 3)], shared=[False])

        def products(scale: float, call: Call = call, first: bool = first) -> list[Tensor]:
            params, grads, _, given = call.arguments(call.tensors)
            grads = [(grads[0] * scale).requires_grad_()]
            state = None if first else {name: [torch.zeros_like(grads[0])] for name in rule.state_names}
            given = None if given is None else {"lr": [given["lr"][0].requires_grad_()]}
            new, after = task_update(rule, params, grads, state, rates=given, step=call.step, backend=backend)
            outputs = [new[0], *(tensor for group in after.values() for tensor in group)]
            leaves = [grads[0], *(given["lr"] if given else [])]
            found = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], create_graph=True)
            twice = torch.autograd.grad([f.sum() for f in found], leaves, allow_unused=True)
            assert all(t is None or t.isfinite().all() for t in twice)
            return [f.detach() for f in found]

        for at, near in zip(products(0.0), products(1e-12), strict=True):
            assert at.isfinite().all()
            torch.testing.assert_close(at, near, rtol=1e-7, atol=1e-7)


def test_dtypes_may_differ_between_parameters() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    call = Call(RULES[3], "a parameter")
    flat = [tensor.to(dtypes[i % len(dtypes)]) for i, tensor in enumerate(call.tensors)]
    for i, output in enumerate(call(*flat)):
        assert output.dtype == dtypes[i % len(dtypes)]
        alone = Call(RULES[3], "a parameter", shapes=[SHAPES[i % 5]], shared=[SHARED[i % 5]])
        assert_equal([output], [alone(*flat[i % 5 :: 5])[i // 5]], 0)


@pytest.mark.parametrize("rule", [RULES[3], *OTHERS], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(rule: Rule) -> None:
    call = Call(rule, "one", shapes=[(300, 400), (64,), (70_000,), (3,)], shared=[True, False, False, True])
    call.tensors = [tensor.float() for tensor in call.tensors]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = call.leaves()
            outputs = call(*leaves)
            found.append([*outputs, *torch.autograd.grad(outputs, leaves, [out.detach() for out in outputs])])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert_equal(others, found[0], 0)


def test_more_tensors_than_threads_or_chunks() -> None:
    count = 300
    call = Call(
        RULES[4], "a tensor", shapes=[(i % 37,) for i in range(count)], shared=[i % 2 == 0 for i in range(count)]
    )
    leaves = call.leaves()
    outputs, expected = call(*leaves), call.formula(*leaves)
    assert_equal(outputs, expected)
    cotangents = randoms([tuple(output.shape) for output in outputs], 9)
    assert_equal(torch.autograd.grad(outputs, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents))


def test_fixed_rates_keep_no_tensor_for_the_backward_pass() -> None:
    param, leaf = torch.ones(5, requires_grad=True), torch.ones(TASKS, 5, requires_grad=True)
    grad = leaf.mul(2)
    kept = weakref.ref(grad)
    (new,), _ = task_update(SGD(0.1, weight_decay=0.1), [param], [grad], backend="fused")
    del grad
    gc.collect()
    assert kept() is None
    new.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full((TASKS, 5), -0.2))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("rates", RATES)
def test_derivatives_without_the_numbers(rule: Rule, rates: str) -> None:
    call = Call(rule, rates)
    leaves = call.leaves()
    expected = call(*leaves)
    with only_derivatives():
        found = call(*leaves)
    cotangents = [torch.randn_like(x) for x in expected]
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert all(x.untyped_storage().nbytes() <= 8 for x in found)
    grads = [torch.autograd.grad(results, leaves, cotangents, allow_unused=True) for results in (expected, found)]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_first_order_gradients_need_no_gradient() -> None:
    start, grad = torch.ones(TASKS, 5, requires_grad=True), torch.ones(TASKS, 5)
    (new,), _ = task_update(SGD(0.1), [start], [grad], backend="fused")
    new.mul(3).sum().backward()
    torch.testing.assert_close(start.grad, torch.full((TASKS, 5), 3.0))
    assert grad.grad is None


def test_backend_is_chosen_in_the_forward_pass() -> None:
    param, grad = torch.ones(5, requires_grad=True), torch.ones(TASKS, 5)
    names = {}
    for backend in BACKENDS:
        with use_backend(backend):
            (new,), _ = task_update(SGD(0.1), [param], [grad])
        assert new.grad_fn is not None
        names[backend] = new.grad_fn.name()
        new.sum().backward()
    assert names["fused"] != names["reference"]


def test_device_without_kernels() -> None:
    param, grad = torch.ones(5, device="meta"), torch.ones(TASKS, 5, device="meta")
    with pytest.raises(BackendUnavailableError, match=r"task_update: .*no kernel for device 'meta'"):
        task_update(SGD(0.1), [param], [grad], backend="fused")
    assert task_update(SGD(0.1), [param], [grad])[0][0].shape == (TASKS, 5)


@pytest.mark.parametrize("rule", [RULES[0], RULES[3], *OTHERS], ids=str)
def test_ops_are_registered_as_they_behave(rule: Rule) -> None:
    call = Call(rule, "mixed")
    call(*call.tensors)  # the kernels are there once they were asked for
    params, grads, state, rates = call.arguments(call.tensors)
    op = library._OPS[type(rule)]
    groups = [params, grads, *((state or {}).get(name, []) for name in op.states), *rates.values()]
    numbers = op.numbers(rule, call.step)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.op().default, (*groups, *numbers), test_utils=tests)
    check_out(op.op(), (*groups, *numbers))
    cotangents = [grads, *(grads if group else [] for group in groups[2:-2])]
    first = [False] if isinstance(rule, SGD) else []
    kept = [bool(group) for group in groups[2:-2]]
    for needed in ([True, True, *kept, True, True], [False, True, *[False] * len(kept), True, False]):
        arguments = (*cotangents, *groups, *numbers, *first, SHARED, needed)
        torch.library.opcheck(op.op("_vjp").default, arguments, test_utils=tests)
        check_out(op.op("_vjp"), arguments)


def check_out(op: Any, arguments: Sequence[Any]) -> None:
    """The overload that writes into given tensors leaves in them what the op returns, bit by bit, or refuses them."""
    expected = op(*arguments)
    given = {f"out{i}": [torch.full_like(x, torch.nan) for x in group] for i, group in enumerate(expected)}
    torch.library.opcheck(op.out, arguments, copy.deepcopy(given), test_utils="test_schema")
    assert op.out(*arguments, **given) is None
    for found, group in zip(given.values(), expected, strict=True):
        assert_equal(found, group, 0)
    for name, group in given.items():
        for wrong in ([], [*group, group[0]], [group[1], *group[1:]], [group[0].float(), *group[1:]]) if group else ():
            with pytest.raises(RuntimeError, match="expected"):
                op.out(*arguments, **{**given, name: wrong})


P, G = torch.ones(4), torch.ones(2, 4)
M = SGD(0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "keywords"),
    [
        (TypeError, "rule: expected a rule of metafast.inner, got float", (0.1, [P], [G]), {}),
        (TypeError, "params: expected a list, tuple or dict of tensors, got Tensor", (M, P, G), {}),
        (ValueError, "params: expected at least one tensor", (M, [], []), {}),
        (TypeError, r"params\['w'\]: expected a tensor, got int", (M, {"w": 1}, {"w": G}), {}),
        (TypeError, "params.0.: expected float32, .* got torch.int64", (M, [P.long()], [G.long()]), {}),
        (TypeError, "grads: expected a dict, as params is, got list", (M, {"w": P}, [G]), {}),
        (TypeError, "grads: expected a list or tuple, as params is, got dict", (M, [P], {"w": G}), {}),
        (ValueError, "grads: expected the keys of params, .*: v", (M, {"w": P}, {"w": G, "v": G}), {}),
        (ValueError, "grads: expected 1 tensors, one a parameter tensor, got 2", (M, [P], [G, G]), {}),
        (ValueError, r"grads.0.: expected the parameter's shape \(4,\), .* got \(2, 3\)", (M, [P], [G[:, 1:]]), {}),
        (ValueError, r"grads.0.: expected the parameter's shape \(\), .* got \(\)", (M, [P[0]], [G[0, 0]]), {}),
        (ValueError, "grads.1.: expected 2 tasks, .* got shape .1, 4.", (M, [P, P], [G, G[:1]]), {}),
        (
            TypeError,
            "grads.0.: expected the parameter's dtype torch.float32, got torch.float64",
            (M, [P], [G.double()]),
            {},
        ),
        (ValueError, "grads.0.: expected the device cpu", (M, [P], [G.to("meta")]), {}),
        (ValueError, "grads.0.: expected a dense tensor", (M, [P], [G.to_sparse()]), {}),
        (TypeError, "state: expected None or what the previous step returned, got list", (M, [P], [G], [G]), {}),
        (ValueError, "state: expected the keys momentum_buffer, got exp_avg", (M, [P], [G], {"exp_avg": [G]}), {}),
        (ValueError, "state: expected nothing for SGD", (SGD(0.1), [P], [G], {"momentum_buffer": [G]}), {}),
        (ValueError, "state: expected what step 2 returned, with momentum_buffer", (M, [P], [G]), {"step": 3}),
        (
            ValueError,
            "state.'momentum_buffer'..0.: expected .* .2, 4., got .4,.",
            (M, [P], [G], {"momentum_buffer": [P]}),
            {},
        ),
        (TypeError, "rates: expected None or a dict", (M, [P], [G]), {"rates": P}),
        (ValueError, "rates: expected keys among lr, weight_decay, got eps", (M, [P], [G]), {"rates": {"eps": P}}),
        (
            ValueError,
            "rates.'lr'.: expected a tensor without dimensions, .* got shape .4,.",
            (M, [P], [G]),
            {"rates": {"lr": P}},
        ),
        (ValueError, "rates.'lr'.: expected 1 tensors", (M, [P], [G]), {"rates": {"lr": [P, P]}}),
        (
            ValueError,
            "rates.'lr'..0.: expected no dimensions or .* .4,., got .2, 4.",
            (M, [P], [G]),
            {"rates": {"lr": [G]}},
        ),
        (TypeError, "rates.'lr'..0.: expected the parameter's dtype", (M, [P], [G]), {"rates": {"lr": [P.half()]}}),
        (
            TypeError,
            "rates.'lr'.: expected float32, .* got torch.int64",
            (M, [P], [G]),
            {"rates": {"lr": torch.tensor(1)}},
        ),
        (TypeError, "step: expected an int, got float", (M, [P], [G]), {"step": 1.0}),
        (ValueError, "step: expected at least 0, got -1", (M, [P], [G]), {"step": -1}),
        (ValueError, "backend: expected one of", (M, [P], [G]), {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named(error: type[Exception], message: str, arguments: Any, keywords: Any) -> None:
    with pytest.raises(error, match=message):
        task_update(*arguments, **keywords)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "lr: expected a finite number of at least 0, got -0.1", {"lr": -0.1}),
        (ValueError, "lr: expected a finite number of at least 0, got nan", {"lr": float("nan")}),
        (TypeError, "lr: expected a number, got Tensor", {"lr": torch.tensor(0.1)}),
        (ValueError, "momentum: expected a finite number of at least 0", {"lr": 0.1, "momentum": -1}),
        (ValueError, "dampening: expected a finite number, got inf", {"lr": 0.1, "dampening": float("inf")}),
        (ValueError, "weight_decay: expected a finite number of at least 0", {"lr": 0.1, "weight_decay": -1.0}),
        (TypeError, "nesterov: expected a bool, got int", {"lr": 0.1, "nesterov": 1}),
        (ValueError, "nesterov: expected momentum > 0", {"lr": 0.1, "nesterov": True}),
        (TypeError, "learn: expected the name of a rate or a mapping", {"lr": 0.1, "learn": 3}),
        (ValueError, "learn: expected names among lr, weight_decay, got 'eps'", {"lr": 0.1, "learn": "eps"}),
        (ValueError, "learn.'lr'.: expected one of number, .*, got 'layer'", {"lr": 0.1, "learn": {"lr": "layer"}}),
        (ValueError, "lr: expected more than 0", {"lr": 0, "learn": "lr", "learn_log": True}),
        (ValueError, "learn_log: expected False", {"lr": 0.1, "learn_log": True}),
        (TypeError, "learn_log: expected a bool, got int", {"lr": 0.1, "learn": "lr", "learn_log": 1}),
        (ValueError, "clip_norm: expected a finite number above 0, got 0", {"lr": 0.1, "clip_norm": 0}),
        (TypeError, "clip_value: expected a number, got str", {"lr": 0.1, "clip_value": "1"}),
        (ValueError, "nesterov: .* dampening == 0", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "dampening": 0.1}),
    ],
)
def test_bad_rules_are_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        SGD(**arguments)


def test_learned_rates_are_described_uniformly() -> None:
    assert SGD(0.1).learn == ()
    assert SGD(0.1, learn="lr").learn == (("lr", "number"),)
    rule = SGD(0.1, weight_decay=0.1, learn={"weight_decay": "tensor_step", "lr": "parameter"}, learn_log=True)
    assert rule.learn == (("lr", "parameter"), ("weight_decay", "tensor_step"))
    assert rule.learned == {"lr": "parameter", "weight_decay": "tensor_step"}
    assert hash(rule) == hash(dataclasses.replace(rule)) == hash(dataclasses.replace(rule, learn=rule.learned))


def test_rules_print_what_was_given() -> None:
    assert str(SGD(0.1, momentum=0.9, clip_norm=1.0)) == "SGD(clip_norm=1.0, lr=0.1, momentum=0.9)"


def test_rules_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SGD(0.1).lr = 0.2  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    shapes = [*SHAPES, (64, 96), (50_001,)]
    for rule, rates, first in itertools.product(RULES, RATES, (True, False)):
        call = Call(rule, rates, first, shapes, [*SHARED, True, False], dtype)
        found = []
        for device in ("cpu", "cuda"):
            leaves = [tensor.to(device).requires_grad_() for tensor in call.tensors]
            outputs = call(*leaves)
            cotangents = [one.to(device) for one in randoms([tuple(output.shape) for output in outputs], 9, dtype)]
            found.append([one.cpu() for one in (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
