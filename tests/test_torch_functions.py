"""Torch's functions on all tasks at once, differentiated afterwards, beside one task after another.

The samples are those of torch's own database of operators, drawn for each task, and the same with special values: ties,
zeros, equal indices.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import warnings
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from differential import difference
from some_cases import FULL
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from metafast.engine.task_model import TaskModel

TASKS = 3
# Of an operator, without METAFAST_FULL=1.
SAMPLES = 3
KINDS = ("as drawn", "ties", "zeros")
COMMON = """
    index_select gather take_along_dim take scatter scatter_add scatter_reduce index_put index_add index_copy
    index_fill index_reduce masked_fill masked_scatter masked_select where cumsum cumprod cummax cummin logcumsumexp
    sort topk kthvalue argsort median nanmedian mode amax amin max min aminmax max_pool2d_with_indices prod norm
    linalg.vector_norm linalg.norm linalg.matrix_norm std var std_mean var_mean softmax log_softmax logsumexp einsum
    baddbmm addmm addbmm addmv addr bmm matmul mm mv dot inner outer tensordot roll flip rot90 tile repeat
    repeat_interleave unfold unfold_copy as_strided expand expand_as select select_scatter slice slice_scatter
    diagonal diagonal_scatter diag_embed tril triu split chunk tensor_split unbind stack cat hstack narrow permute
    transpose movedim reshape view view_as squeeze unsqueeze flatten unflatten clamp clamp_min clamp_max abs sign
    sgn sqrt rsqrt square pow float_power exp log log1p expm1 sigmoid tanh erf sinc atan2 hypot maximum minimum fmax
    fmin lerp addcmul addcdiv mean sum nansum mul div true_divide remainder fmod trace cross cdist dist renorm
    linalg.inv linalg.solve linalg.cholesky linalg.det linalg.slogdet linalg.eigh linalg.svdvals linalg.multi_dot
    linalg.solve_triangular cholesky_solve logdet trapezoid diff gradient nan_to_num copysign xlogy special.xlog1py
    special.entr special.erfcx polygamma lgamma digamma masked.softmax masked.mean masked.sum masked.logsumexp
    masked.var masked.prod masked.amax segment_reduce bernoulli __getitem__ fill zero index_put_ logaddexp logit
    cumulative_trapezoid block_diag kron meshgrid vstack dstack column_stack fft.fft fft.rfft fft.irfft
"""
OPS = [
    op
    for op in op_db
    if (op.name.startswith("nn.functional.") or op.name in COMMON.split())
    and op.supports_autograd
    and torch.float64 in op.supported_dtypes("cpu")
]
COMPLEX = """
    mul matmul bmm einsum fft.fft fft.ifft fft.rfft fft.irfft abs angle real imag conj view_as_real view_as_complex
    complex polar exp sum prod cumsum cumprod index_select gather masked_fill where linalg.vector_norm
    nn.functional.linear nn.functional.conv1d softmax std var
"""
COMPLEX_OPS = [
    op
    for op in op_db
    if op.name in COMPLEX.split() and op.supports_autograd and torch.complex128 in op.supported_dtypes("cpu")
]


class Call(nn.Module):
    """A call of an operator whose floating tensors are parameters."""

    def __init__(self, function, floating, rebuilt, in_place):
        super().__init__()
        self.function, self.rebuilt, self.in_place = function, rebuilt, in_place
        for number, x in enumerate(floating):
            self.register_parameter(f"p{number}", nn.Parameter(x.clone()))

    def forward(self, *others):
        floating = [getattr(self, f"p{number}") for number in range(len(dict(self.named_parameters())))]
        if self.in_place:
            floating[0] = floating[0].clone()
        args, kwargs = self.rebuilt(floating, list(others))
        leaves = pytree.tree_leaves(self.function(*args, **kwargs))
        found = [x for x in leaves if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())]
        return tuple(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in found if x.numel())


def _cut(sample):
    """A sample's floating tensors, its other tensors, and what puts such into their places."""
    leaves, structure = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
    floating = [isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) for x in leaves]
    others = [isinstance(x, torch.Tensor) and not f for x, f in zip(leaves, floating, strict=True)]

    def rebuilt(own, given):
        own, given = iter(own), iter(given)
        values = [
            next(own) if f else next(given) if o else copy.copy(x)
            for x, f, o in zip(leaves, floating, others, strict=True)
        ]
        return pytree.tree_unflatten(values, structure)

    def pick(chosen):
        return [x.detach().resolve_conj().resolve_neg().clone() for x, c in zip(leaves, chosen, strict=True) if c]

    return pick(floating), pick(others), rebuilt


def _special(kind, floating, others):
    """The same shapes with values at which rules differ."""
    if kind == "as drawn":
        return floating, others
    changed = []
    for x in floating:
        if kind == "ties":
            x = (2 * x).round() / 2 if not x.is_complex() else x
        else:
            x = torch.where(torch.rand(x.shape) < 0.5, torch.zeros_like(x), x)
        changed.append(x)
    # One index for all, which is a valid one.
    equal = [x if x.dtype == torch.bool or not x.numel() else x.flatten()[0].expand(x.shape).clone() for x in others]
    return changed, equal if kind == "ties" else others


def _derivatives(outputs, leaves, second):
    """Outputs, their first derivative with a fixed cotangent, and the derivative of a smooth function of that one."""
    found = {f"output {i}": x for i, x in enumerate(outputs)}
    outputs = [x for x in outputs if x.requires_grad]
    if not outputs:
        return found
    total = sum((_weights(x[0]) * (x.square() / 2 + x)).sum() for x in outputs)
    first = torch.autograd.grad(total, leaves, create_graph=second, materialize_grads=True)
    found |= {f"derivative {i}": x.detach() for i, x in enumerate(first)}
    if second and any(x.requires_grad for x in first):
        real = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in first]
        total = sum((x.square() + x + 2.0).log().sum() for x in real)
        found |= {
            f"second derivative {i}": x
            for i, x in enumerate(torch.autograd.grad(total, leaves, materialize_grads=True))
        }
    return found


def _weights(x):
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64)).reshape(x.shape) + 0.3


class Difference(NamedTuple):
    """Why a sample is not equal."""

    where: str
    problem: str


def examine(op, draws, kind, shared, in_place, counts, where):
    """Compares one sample, drawn for each task; None or a :class:`Difference`.

    Args:
        shared: the places of the floating tensors that all tasks share.
    """
    parts = [_cut(draw) for draw in draws]
    values = [_special(kind, floating, others) for floating, others, _ in parts]
    try:
        own = [torch.stack(column) for column in zip(*(floating for floating, _ in values), strict=True)]
        others = [torch.stack(column) for column in zip(*(others for _, others in values), strict=True)]
    except (RuntimeError, ValueError):
        counts["other shapes from draw to draw"] += 1
        return None
    if not own:
        return None
    module = Call(
        _method(op.inplace_variant) if in_place else _function(op), [x[0] for x in own], parts[0][2], in_place
    )
    leaves = {f"p{i}": (x[0] if i in shared else x).clone() for i, x in enumerate(own)}
    batched = {name: x for i, (name, x) in enumerate(leaves.items()) if i not in shared}
    common = {name: x for name, x in leaves.items() if name not in batched}

    def of_loop():
        def one(task):
            # Of their own, as a plain loop's are: some operators look at the memory of a view.
            params = {name: x if name in common else x[task].clone() for name, x in leaves.items()}
            return torch.func.functional_call(module, params, tuple(x[task].clone() for x in others))

        return [torch.stack(column) for column in zip(*map(one, range(TASKS)), strict=True)]

    expected = error = None
    # Some inputs have no derivative, some operators no second one.
    for differentiated, second in itertools.product((list(leaves), ["p0"]), (True, False)):
        for name, x in leaves.items():
            x.requires_grad_(name in differentiated)
        of = [leaves[name] for name in differentiated]
        try:
            with sdpa_kernel(SDPBackend.MATH):
                expected = _seeded(0, lambda: _derivatives(of_loop(), of, second))  # noqa: B023
                others_drawn = [_seeded(seed, lambda: dict(enumerate(of_loop()))) for seed in range(4)]
            break
        except Exception as raised:
            error = raised
    if expected is None:
        counts[f"torch does not: {op.name}: {_line(error)[:80]}"] += 1
        return None
    drawn = any(
        not torch.equal(again[i].nan_to_num(), x.nan_to_num())
        for again in others_drawn[1:]
        for i, x in others_drawn[0].items()
    )
    function = TaskModel(module, "loop" if drawn else "auto")
    try:
        found = _seeded(0, lambda: _derivatives(function.compute(batched, common, tuple(others)), of, second))
    except Exception as raised:
        return Difference(where, f"{type(raised).__name__}: {_line(raised)}")
    order = "first" if not second else "second"
    counts[f"{'random' if drawn else function._batching}, to {order} order"] += 1
    if drawn and "attention" in op.name:
        # Its masks are metafast's own; tests/test_attention.py compares them.
        return None
    outputs = {name: x for name, x in expected.items() if name.startswith("output")}
    if any(x.isnan().any() for x in outputs.values()):
        # What is not a number has no derivative to speak of.
        expected, found = outputs, {name: found[name] for name in outputs}
    for name, x in expected.items():
        if not torch.equal(x.isnan(), found[name].isnan()):
            return Difference(where, f"{name}: NaN in other places")
    problem = difference(*({name: x.nan_to_num(0.0) for name, x in side.items()} for side in (found, expected)))
    return problem and Difference(where, problem)


def _seeded(seed, function):
    torch.manual_seed(seed)
    # Some operators have sparse derivatives, which torch.equal does not take.
    return {name: x.detach().to_dense() for name, x in function().items()}


def _line(error):
    return (str(error).splitlines() or [""])[0][:300]


def _function(op):
    """The operator, which the database has with a seed set before each call where it is random."""
    seeds = "wrapper_set_seed" in getattr(getattr(op.op, "__code__", None), "co_names", ())
    named = functools.reduce(lambda place, name: getattr(place, name, None), op.name.split("."), torch)
    if seeds or named is op.op:
        # By its name, as a model calls it.
        return lambda *args, **kwargs: functools.reduce(getattr, op.name.split("."), torch)(*args, **kwargs)
    return _method(op.op) if op.op is getattr(torch.Tensor, op.name, None) else op.op


def _method(method):
    return lambda x, *args, **kwargs: getattr(x, method.__name__)(*args, **kwargs)


def _samples(op, dtype):
    """Three draws of all samples."""
    # Not op.sample_inputs, which sets the seed before each.
    draws = (list(op.sample_inputs_func(op, "cpu", dtype, requires_grad=False)) for _ in range(TASKS))
    # Of some operators there are more or fewer from draw to draw.
    return list(zip(*draws, strict=False))


def examined(op, dtype, counts):
    """The differences in an operator's samples."""
    samples = _samples(op, dtype)
    numbers = list(range(len(samples)))
    if not FULL:
        numbers = random.sample(numbers, min(len(numbers), SAMPLES))
    problems = []
    for number in numbers:
        floating = len(_cut(samples[number][0])[0])
        kinds = KINDS if FULL else ("as drawn", random.choice(KINDS[1:]))
        for kind in kinds:
            some = {i for i in range(floating) if random.random() < 0.4}
            for in_place in {False, op.inplace_variant is not None and _function(op) is op.op}:
                where = f"{op.full_name} #{number}, {kind}, shared {sorted(some)}{', in place' if in_place else ''}"
                if len(some) < floating:
                    problems.append(examine(op, samples[number], kind, some, in_place, counts, where))
    return [problem for problem in problems if problem]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.full_name)
def test_functions(op, generator):
    random.seed(torch.initial_seed())
    with warnings.catch_warnings():
        # Of torch, of what its samples do.
        warnings.simplefilter("ignore")
        problems = examined(op, torch.float64, Counter())
    assert not problems, "\n".join(map(str, problems))


@pytest.mark.parametrize("op", COMPLEX_OPS, ids=lambda op: op.full_name)
def test_complex_functions(op, generator):
    random.seed(torch.initial_seed())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problems = examined(op, torch.complex128, Counter())
    assert not problems, "\n".join(map(str, problems))
