"""Recorded computations against the same in eager mode, bit by bit, over several replays with new inputs."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from metafast.program import NotRecordableError, Program, record
from metafast.program.arena import ALIGNMENT, Arena, rounded
from metafast.program.graph import Form, Node, leaves, mapped

REPLAYS = 3


def eager(function, inputs):
    """The function's result, which must not change these inputs."""
    return function(*[tensor.clone() for tensor in inputs])


def same(found, expected):
    found, expected = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def poison(program):
    """Writes NaN over all intermediate values: a replay may only read what it wrote."""
    with torch.inference_mode():
        for call in program._calls:
            for tensor in pytree.tree_leaves((getattr(call, "args", ()), getattr(call, "keywords", {}))):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() == program.bytes:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    whole.fill_(255)
                    return
    raise AssertionError("no value lies in the memory of the program")


def agrees(function, draw, replays=REPLAYS):
    """The program of a function whose replays give what the function gives."""
    program = Program(function, draw())
    for _ in range(replays):
        inputs = draw()
        kept = [tensor.clone() for tensor in inputs]
        same(program.run(inputs), eager(function, inputs))
        same(inputs, kept)
    agrees_in_place(function, draw)
    return program


def agrees_in_place(function, draw):
    """The same with inputs that stay where they are, between other numbers."""
    places = [torch.zeros(tensor.numel() + 5, dtype=tensor.dtype) for tensor in draw()]
    inputs = [place[3:-2].view(tensor.shape) for place, tensor in zip(places, draw(), strict=True)]
    program = Program(function, inputs, range(len(inputs)))
    for _ in range(2):
        for tensor, new in zip(inputs, draw(), strict=True):
            tensor.copy_(new)
        kept = [place.clone() for place in places]
        assert program.fits(inputs)
        # As a replay has inputs: contiguous, and changed nowhere else.
        same(program.run(inputs), eager(function, inputs))
        same(places, kept)


@pytest.fixture
def normal(generator):
    def normal(*shapes, dtype=torch.float64):
        return lambda: [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    return normal


# Random programs, all of whose values are [3, 4, 4].

SHAPE = (3, 4, 4)


def added_in_place(x, y):
    z = x * 1
    z.add_(y, alpha=0.5)
    return z


def changed_through_a_view(x, y):
    z = x + y
    z[1].mul_(2)
    z.transpose(1, 2)[:, 0].copy_(y[:, 1])
    return z


def row_put(x, y):
    z = x.clone()
    z[torch.tensor([2, 0])] = y[:2]
    return z


def parts_swapped(x, y):
    first, second = x.split([1, 3], dim=1)
    return torch.cat([second + y[:, 1:], first], dim=1)


def chosen(x, y):
    values, indices = x.sort(dim=-1)
    return values + y.gather(-1, indices)


def backward(x, y):
    x = x.detach().requires_grad_()
    z = F.layer_norm(x, (4,)).softmax(-1) * 1
    z[0].mul_(3)  # its gradient is of a view by strides and offset
    return torch.autograd.grad((z * y).sum(), x)[0]


def several(x, y):
    variance, mean = torch.var_mean(x, dim=1, keepdim=True)
    return (y - mean) * (variance + 1).rsqrt()


OPERATIONS = [
    lambda x, y: x + y,
    lambda x, y: x * y,
    lambda x, y: x - 0.5,
    lambda x, y: torch.bmm(x, y),
    lambda x, y: torch.bmm(x.transpose(1, 2), y),
    lambda x, y: x.transpose(1, 2),
    lambda x, y: x[:1].expand(SHAPE),
    lambda x, y: x.sum(dim=1, keepdim=True).expand(SHAPE),
    lambda x, y: x.sum(0) + y,
    lambda x, y: torch.stack(list(reversed(x.unbind(0)))) + y,
    lambda x, y: torch.cat([x[1:], y[:1]]),
    lambda x, y: x.masked_fill(y > 0, 0.25),
    lambda x, y: torch.where(x > y, x, y),
    lambda x, y: x.softmax(-1),
    lambda x, y: F.layer_norm(x, (4, 4), y[0], y[1]),
    lambda x, y: x.flip(0).contiguous(),
    lambda x, y: x.reshape(4, 12).t().reshape(SHAPE),
    lambda x, y: x.as_strided(SHAPE, (16, 1, 4), x.storage_offset()),
    lambda x, y: x.mean().expand(SHAPE) + torch.arange(4.0),
    lambda x, y: torch.zeros_like(x).index_add(0, torch.tensor([0, 0, 2]), y),
    lambda x, y: torch.ones(4, dtype=x.dtype).mul_(y[0, 0]) + x,
    lambda x, y: x.tanh().float().double(),
    added_in_place,
    changed_through_a_view,
    row_put,
    parts_swapped,
    chosen,
    backward,
    several,
]


class RandomProgram:
    """A directed acyclic graph of operations that is the same at each call."""

    def __init__(self, numbers):
        length = numbers.randint(5, 40)
        self.calls = [
            (numbers.choice(OPERATIONS), *(max(0, n - numbers.randint(0, 6)) for _ in "xy")) for n in range(1, length)
        ]
        self.outputs = [-1, *(numbers.randrange(length) for _ in range(3))]

    def __call__(self, x, y):
        values = [x, y]
        for operation, first, second in self.calls:
            value = operation(values[first], values[second])
            values.append(value / (value.abs().amax() + 1))
        return [values[i] for i in self.outputs]


@pytest.mark.parametrize("number", range(12))
def test_random_programs(generator, normal, number):
    function = RandomProgram(random.Random(torch.randint(2**31, (), generator=generator).item()))
    draw = normal(SHAPE, SHAPE)
    program = agrees(function, draw)
    inputs = draw()
    poison(program)
    same(program.run(inputs), eager(function, inputs))


def normalised_twice(x, y):
    """Second derivatives of layers of the same shapes, one after another."""
    x = x.detach().requires_grad_()
    out = x
    for _ in range(3):
        out = F.layer_norm(F.gelu(out @ y.mT), (4,), y[0, 0], y[0, 1]) + out.flip(0)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.cos().sum(), x)


FORMS = [
    *(lambda x, y, f=f: [f(x, y), f(y, x), f(f(x, y), f(y.mT, x)), f(x.mT, y.mT), f(x.flip(0), y)] for f in OPERATIONS),
    normalised_twice,
    # Equal arguments of other types, and equal forms in other memory.
    lambda x, y: [x * 1, x + 1, x + 1.0, x + True, (x > 0) + 1, (x > 0) + True, (x > 0) + 1.0],
    lambda x, y: [x[1:], x[:2], x.clone()[1:], x.to(torch.float32), x.float() + y, x.float() + 1],
    lambda x, y: [F.dropout(x, 0.0), torch.var_mean(x, 0), torch.var_mean(x, 0), x.split(2, 1), x.split(2, 1)],
]


@pytest.mark.parametrize("function", FORMS)
def test_forms_are_those_of_tensors_with_data(normal, function):
    """Also where operations of equal forms were seen before."""
    inputs = normal(SHAPE, SHAPE)()
    values = {}
    given = iter(inputs)
    for node in record(function, inputs).nodes:
        if node.kind == "output":
            break
        args, kwargs = (mapped(Node, values.__getitem__, arguments) for arguments in (node.args, node.kwargs))
        values[node] = {
            "input": lambda: next(given),
            "tensor": lambda node=node: node.target,
            "call": lambda node=node, args=args, kwargs=kwargs: node.target(*args, **kwargs),
        }[node.kind]()
        tensors = [leaf for leaf in pytree.tree_leaves(values[node]) if isinstance(leaf, torch.Tensor)]
        for form, tensor in zip(leaves(Form, node.value), tensors, strict=True):
            assert form == Form.of(tensor)
            assert form.is_contiguous == tensor.is_contiguous()


def test_memory_is_used_again(normal):
    def function(x):
        for _ in range(50):
            x = torch.mm(x, x).tanh()
        return x

    program = agrees(function, normal((16, 16)))
    assert program.bytes <= 3 * 16 * 16 * 8


def test_nothing_is_written_over_that_is_read_later(normal):
    def function(x):
        y = x.exp()
        view = y.view(-1)[::2]
        z = y.neg()  # y lives on in its view
        w = z + 1
        return w.sum() + view.sum(), z * 2, view

    agrees(function, normal((6, 4)))


def stacks(program):
    """How many stacks it copies together."""
    return sum(getattr(call, "func", None) is torch.ops.aten.stack.out for call in program._calls)


STACKS = {
    "first dimension": (0, lambda x, y: torch.stack([x.exp(), y.sin(), x * y])),
    "last dimension": (0, lambda x, y: torch.stack([x.exp(), y.sin()], -1).sum(0)),
    "results of one call": (0, lambda x, y: torch.stack(torch.ops.aten.native_layer_norm(x, [4], None, None, 0.1)[1:])),
    "transposed": (0, lambda x, y: torch.stack([x.exp().mT, (x + y).permute(2, 0, 1).permute(1, 0, 2)], 2).exp()),
    "a gradient of query, key and value": (0, lambda x, y: torch.stack([x.exp(), y.sin()]).permute(1, 2, 0, 3).clone()),
    "a gradient that is copied in order": (
        0,
        lambda x, y: torch.stack([x.exp(), y.sin(), x * y], 1).permute(2, 0, 1, 3).contiguous().view(3, 2, 12).exp(),
    ),
    "copied in order, read twice": (
        1,
        lambda x, y: (lambda s: (s.mT.contiguous(), s.sum()))(torch.stack([x, y.sin()])),
    ),
    "read after": (0, lambda x, y: (lambda s: (s * 2, s.mT @ s, s[0]))(torch.stack([x.exp(), y.sin()]))),
    "changed afterwards": (0, lambda x, y: torch.stack([x.exp(), y.sin()]).mul_(2).add_(1)),
    "input": (1, lambda x, y: torch.stack([x, y.sin()])),
    "a constant": (1, lambda x, y: torch.stack([x.exp(), torch.ones(2, 3, 4, dtype=x.dtype)])),
    "a part twice": (1, lambda x, y: (lambda e: torch.stack([e, e]))(x.exp())),
    "a part and its view": (1, lambda x, y: (lambda e: torch.stack([e, e.permute(0, 1, 2).clone(), e[:]]))(x.exp())),
    "a part elsewhere": (1, lambda x, y: (lambda e: (torch.stack([e, y.sin()]), e + 1))(x.exp())),
    "a part as the result": (1, lambda x, y: (lambda e: (torch.stack([e, y.sin()]), e))(x.exp())),
    "a piece": (1, lambda x, y: torch.stack([x.exp()[:, :2], y.sin()[:, 1:]])),
    "changed in place": (1, lambda x, y: torch.stack([x.exp().mul_(y), y.sin()])),
    "a stack of stacks": (
        1,
        lambda x, y: torch.stack([torch.stack([x.exp(), y.sin()]), torch.stack([y.exp(), x.sin()])]),
    ),
    "two stacks of a part": (
        2,
        lambda x, y: (lambda e: (torch.stack([e, y.sin()]), torch.stack([e, y.cos()])))(x.exp()),
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_parts_of_a_stack_are_made_in_it(name, normal):
    copied, function = STACKS[name]
    draw = normal((2, 3, 4), (2, 3, 4))
    program = agrees(function, draw)
    assert stacks(program) == copied
    inputs = draw()
    poison(program)
    same(program.run(inputs), eager(function, inputs))


# Inputs and outputs


def test_inputs_of_any_strides(generator):
    # Whole numbers: a program packs such inputs, and BLAS may round products of real ones differently by layout.
    def whole(*shape):
        return torch.randint(-9, 10, shape, generator=generator).float()

    def draw():
        return [
            whole(4, 3).t(),
            whole(3, 8)[:, ::2],
            whole(4).expand(3, 4),
            whole(3).as_strided((3, 1), (1, 7)),
        ]

    agrees(lambda a, b, c, d: (a @ b.t() + c[:, :3], (d * a).reshape(2, 6), d.squeeze(1).exp()), draw)


def test_inputs_that_are_parts_of_one_tensor(generator):
    def function(x, y):
        return x.as_strided((2,), (1,)) + y.as_strided((2,), (1,), y.storage_offset() + 1)

    agrees(function, lambda: list(torch.randn(2, 4, generator=generator)))


def test_empty_and_scalar(normal):
    def function(empty, scalar, x):
        return torch.cat([empty, x[:2] * scalar]), empty.sum(), empty * 2, scalar + 1, x[3:3].exp(), scalar.expand(2)

    agrees(function, normal((0, 4), (), (3, 4)))


def test_offsets_in_memory(normal):
    def function(x):
        y, z = x * 2, x * 3
        return z.as_strided((2, 2), (4, 1), 1) + y.as_strided((2, 2), (1, 4)), y[1:].as_strided((2,), (1,), 5)

    agrees(function, normal((3, 4)))


def test_outputs_that_are_inputs_views_or_constants(normal):
    def function(x, y):
        z = x + y
        return {"in": x, "view of in": y.t(), "twice": (z, z), "view": z[0], "constant": torch.ones(2), "none": None}

    program = agrees(function, normal((3, 3), (3, 3)))
    result = program.run(normal((3, 3), (3, 3))())
    before = result["twice"][1].clone()
    result["twice"][0].zero_()
    result["view"].fill_(7)
    result["constant"].zero_()
    same(result["twice"][1], before)
    assert (program.run(normal((3, 3), (3, 3))())["constant"] == 1).all()


def test_results_are_ordinary_and_the_callers_own(normal):
    draw = normal((3, 3))
    program = Program(lambda x: (x @ x, x[0]), draw())
    first = program.run(draw())
    kept = [tensor.clone() for tensor in first]
    program.run(draw())
    same(first, kept)
    result = first[0].requires_grad_()
    assert not result.is_inference()
    (result**2).sum().backward()
    same(result.grad, 2 * kept[0])


def test_inputs_changed_in_place(normal):
    def function(x, y):
        x.add_(y)
        y[0] = x[1]
        return x, y, x * y

    agrees(function, normal((3, 2), (3, 2)))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float64, torch.float32, torch.bfloat16, torch.complex64]
)
def test_dtypes(normal, dtype):
    def function(x, y):
        z = x & y if dtype == torch.bool else x * y + x
        return z, z.to(torch.float64 if not dtype.is_complex else dtype).sum(0), x == y, z.t().contiguous()

    agrees(function, normal((3, 4), (3, 4), dtype=dtype))


# Operations out of the ordinary


def grad(loss):
    def function(x, w):
        w = w.detach().requires_grad_()
        return torch.autograd.grad(loss(x, w), w)

    return function


def batch_normed(x, w):
    mean, variance = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    y = F.batch_norm(x, mean, variance, training=True)
    return F.batch_norm(y, mean, variance), mean, variance


def lists_in_place(x, w):
    values = [x * 2, w * 3]
    torch._foreach_add_(values, 1.0)
    torch._foreach_mul_(values, [2.0, 3.0])
    return torch._foreach_sqrt([v.abs() for v in values]), values


def reshaped(x, w):
    y = x * 2
    z = y + w
    y.t_()
    y[0] += 1
    z.unsqueeze_(0).transpose_(1, 2)
    return y @ w, z, z.squeeze_(0) + y


UNUSUAL = {
    "a gradient not asked for": grad(lambda x, w: F.layer_norm(x, (4,), w[0]).pow(3).sum()),
    "of a convolution": grad(lambda x, w: F.conv1d(x[None], w[:, :, None]).pow(2).sum()),
    "of batch norm in eval": grad(
        lambda x, w: F.batch_norm(x * w, torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)).pow(2).sum()
    ),
    "statistics that start as constants": batch_normed,
    "lists in place": lists_in_place,
    "lists": lambda x, w: [*torch._foreach_add([x * 2, w], [w, x]), *torch._foreach_exp([x]), x.unbind(1)[0]],
    "log sigmoid": grad(lambda x, w: F.logsigmoid(x * w).pow(2).sum()),
    "an output given": lambda x, w: torch.add(x, w, out=torch.empty_like(x)) * 2,
    "diagonals": lambda x, w: (x.fill_diagonal_(0) + torch.diag(w.diagonal())).triu(),
    "complex": lambda x, w: (torch.fft.fft(x).conj() * w).real,
    "maxima": lambda x, w: [*torch.max(x, 1), *torch.topk(w, 2), x.argmin(), x.cummax(0)],
    "splits": lambda x, w: [part.exp() for part in x.tensor_split(3)] + list(w.chunk(2, 1)) + list(x.unbind(1)),
    "a decomposition": lambda x, w: torch.linalg.solve(x @ x.t() + 4 * torch.eye(4, dtype=x.dtype), w),
    "a constant changed": lambda x, w: torch.tensor([1.0, 2.0, 3.0, 4.0]).add_(1).mul_(x[0]) + w,
    "reshaped in place": reshaped,
    "accumulated": lambda x, w: x.index_put((torch.tensor([0, 0, 1]),), w[:3], accumulate=True).scatter_add(
        0, torch.zeros(1, 4, dtype=torch.long), w
    ),
}


@pytest.mark.parametrize("function", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_operations(normal, function):
    agrees(function, normal((4, 4), (4, 4)))


# Random numbers


@pytest.mark.parametrize(
    "function",
    [lambda x: F.dropout(x), lambda x: x + torch.randn_like(x), lambda x: x * torch.rand(3, 3) + torch.randperm(3)],
)
def test_random_numbers(normal, function):
    (x,) = normal((3, 3))()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    program = Program(function, [x])
    assert torch.equal(torch.get_rng_state(), before)
    expected = [function(x) for _ in range(3)]
    assert not torch.equal(*expected[:2])
    torch.manual_seed(1)
    same([program.run([x]) for _ in range(3)], expected)


def seeded(x):
    torch.manual_seed(0)
    return x + torch.randn(3, 3)


def forked(x):
    with torch.random.fork_rng(devices=[]):
        y = torch.rand_like(x)
    return y + torch.rand_like(x)


FIXED = torch.zeros(3)
SPARSE = torch.eye(3).to_sparse()


def sparse_gradient(x):
    weight = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.embedding(torch.arange(2), weight, sparse=True).sum(), weight)
    return gradient.to_dense()


REFUSED = {
    "branch": (lambda x: x if x.sum() > 0 else -x, "depends on the values of tensors in Python"),
    "item": (lambda x: x * x.sum().item(), "depends on the values of tensors in Python"),
    "item of another tensor": (lambda x: x * FIXED.sum().item(), "depends on the values of tensors in Python"),
    "tolist": (lambda x: x * x[0].tolist()[0], "depends on the values of tensors in Python"),
    "nonzero": (lambda x: x.nonzero(), "depends on the values of tensors in Python"),
    "nonzero of another tensor": (lambda x: x + FIXED.nonzero().sum(), "depends on the values of tensors in Python"),
    "mask": (lambda x: x[x > 0], "depends on the values of tensors in Python"),
    "unique": (lambda x: torch.unique(x), "depends on the values of tensors in Python"),
    "equal": (lambda x: x if torch.equal(x, 2 * x) else -x, "depends on the values of tensors in Python"),
    "seed": (seeded, "draws random numbers and sets the random state"),
    "state put back": (forked, "draws random numbers and sets the random state"),
    "generator": (lambda x: x + torch.rand(3, generator=torch.Generator().manual_seed(1)), "generator of its own"),
    "Python's numbers": (lambda x: x * random.random(), "Python's random numbers"),
    "strides in place": (lambda x: (x * 2).as_strided_((2,), (1,)) + 1, "shape or the memory of a tensor in place"),
    "resized": (lambda x: torch.add(x, 1, out=torch.empty(0)), "shape or the memory of a tensor in place"),
    "other memory": (lambda x: torch.empty(0).set_(x * 2) + 1, "shape or the memory of a tensor in place"),
    "several outputs given": (
        lambda x: torch.max(x, 1, out=(torch.empty(3), torch.empty(3, dtype=torch.long)))[0],
        "several results put into given tensors",
    ),
    "a sparse tensor": (lambda x: torch.sparse.mm(SPARSE, x), "layout torch.sparse_coo"),
    "a sparse gradient": (sparse_gradient, "layout torch.sparse_coo"),
    "another tensor changed": (lambda x: x + FIXED.clamp_(0, 0), "neither an input nor made by it"),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_replay_would_get_wrong_is_refused(normal, function, message):
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(NotRecordableError, match=message):
        record(function, normal((3, 3), dtype=torch.float32)())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_tensors_of_another_recording_are_refused(normal):
    (x,) = normal((3, 3))()
    kept = []
    record(lambda x: kept.append(x * 2), [x])
    for function in (lambda x: kept[0], lambda x: x + kept[0]):
        with pytest.raises((NotRecordableError, AssertionError), match=r"does not tell of|fake mode"):
            record(function, [x])


def test_inputs_that_stay_are_not_copied(normal):
    def function(x, y, z):
        return (x @ y).exp() + z.mul_(2)

    x, y, z = inputs = normal((4, 4), (4, 4), (4, 4))()
    program = Program(function, inputs, {0, 2})
    # The second may move; the third is changed in place, where only a copy may be.
    assert [a is not b for a, b in zip(program.copied(inputs), inputs, strict=True)] == [False, True, True]
    assert program.fits([x, y.clone(), z.clone()])
    assert not program.fits([x.clone(), y, z])
    assert not program.fits([x.t(), y, z])
    assert {tensor.data_ptr() for tensor in program._inputs} & {t.data_ptr() for t in inputs} == {x.data_ptr()}
    given = [x, *normal((4, 4), (4, 4))()]
    same(program.run(given), eager(function, given))


def test_other_tensors_are_read_live(normal):
    table = torch.arange(3, dtype=torch.float64)
    program = agrees(lambda x: (x + table) * table.exp(), normal((2, 3)))
    table.mul_(-2)
    inputs = normal((2, 3))()
    same(program.run(inputs), (inputs[0] + table) * table.exp())
    assert all(tensor is table for tensor in program.reached)
    assert program.reached


# Arena


@pytest.mark.parametrize("trial", range(5))
def test_places_never_overlap(generator, trial):
    numbers = random.Random(torch.randint(2**31, (), generator=generator).item())
    arena, taken, most = Arena(), {}, 0
    for _ in range(400):
        if taken and numbers.random() < 0.5:
            offset = numbers.choice(list(taken))
            arena.give_back(offset, taken.pop(offset))
        else:
            size = numbers.choice([0, 1, 8, 64, 65, 1000, numbers.randint(1, 5000)])
            offset = arena.take(size)
            assert offset % ALIGNMENT == 0
            assert offset not in taken
            taken[offset] = size
        places = sorted((offset, offset + rounded(size)) for offset, size in taken.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
        assert not places or places[-1][1] <= arena.size
        most = max(most, sum(end - start for start, end in places))
    assert most <= arena.size
    for offset, size in taken.items():
        arena.give_back(offset, size)
    # All is one free place again.
    before = arena.size
    assert arena.take(before) == 0
    assert arena.size == before


def test_free_places_are_used_again_and_merged():
    arena = Arena()
    offsets = [arena.take(64) for _ in range(5)]
    assert offsets == [0, 64, 128, 192, 256]
    for index in (1, 3, 2):
        arena.give_back(offsets[index], 64)
    assert arena.take(192) == 64
    assert arena.size == 320
    arena.give_back(64, 192)
    assert arena.take(64) == 64
    # What is free at the end grows.
    arena.give_back(offsets[4], 64)
    assert arena.take(1000) == 128
    assert arena.size == 128 + rounded(1000)


LOSSES = {
    "binary_cross_entropy": lambda x, y: torch.nn.functional.binary_cross_entropy(x.sigmoid(), y.sigmoid()),
    "mse_loss": torch.nn.functional.mse_loss,
    "smooth_l1_loss": torch.nn.functional.smooth_l1_loss,
    "huber_loss": torch.nn.functional.huber_loss,
    "soft_margin_loss": lambda x, y: torch.nn.functional.soft_margin_loss(x, y.sign()),
    "qr": lambda x, y: torch.stack(torch.linalg.qr(x)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LOSSES)
def test_overloads_that_resize_what_they_are_given_or_ask_what_shares_its_storage(name, generator):
    def function(x, y):
        return x + 1, LOSSES[name](x, y), y * 2

    inputs = [torch.randn(40, 40, generator=generator) for _ in range(2)]
    for found, expected in zip(Program(function, inputs).run(inputs), function(*inputs), strict=True):
        assert torch.equal(found, expected)
