"""Models that keep something from call to call: what they give and leave is as in a plain loop, or the call is refused."""

from __future__ import annotations

import copy
import functools
import gc
import warnings

import pytest
import torch
from plain_loop import gradients, meta_gradients, query_losses
from torch import nn

import metafast
from metafast.inner import SGD
from metafast.program import NotRecordableError

TASKS, STEPS, RATE = 3, 2, 0.1
functorch = torch._C._functorch


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mask = None


class Mask(Base):
    def forward(self, x):
        n = x.shape[0]
        if self.mask is None or self.mask.shape[-1] != n:
            self.mask = x.new_ones(n, n).tril()
        return self.linear(self.mask @ x)


class LazyBuffer(Base):
    def forward(self, x):
        if "table" not in self._buffers:
            self.register_buffer("table", torch.linspace(0, 1, 4, dtype=x.dtype), persistent=False)
        return self.linear(x * self.table)


class Tables(Base):
    def __init__(self):
        super().__init__()
        self.tables = {}

    def forward(self, x):
        n = x.shape[0]
        if n not in self.tables:
            self.tables[n] = x.new_ones(n, n).tril()
        return self.linear(self.tables[n] @ x)


class Rotary:
    def __init__(self):
        self.cosines = None
        self.length = 0

    def __call__(self, x):
        if self.length < x.shape[0]:
            self.length = x.shape[0]
            self.cosines = torch.arange(self.length, device=x.device, dtype=x.dtype)[:, None].cos()
        return x * self.cosines[: x.shape[0]]


class Plain(Base):
    """A table in an object that is no module."""

    def __init__(self):
        super().__init__()
        self.rotary = Rotary()

    def forward(self, x):
        return self.linear(self.rotary(x))


@functools.lru_cache
def triangle(n):
    return torch.ones(n, n, dtype=torch.float64).tril()


class Cached(Base):
    def forward(self, x):
        return self.linear(triangle(x.shape[0]) @ x)


outside = {}


class Outside(Base):
    def forward(self, x):
        n = x.shape[0]
        if n not in outside:
            outside[n] = x.new_ones(n, n).tril()
        return self.linear(outside[n] @ x)


class Twice(Base):
    """One layer under two names, after which torch's functional_call leaves the given parameters in the model."""

    def __init__(self, twice=True):
        super().__init__()
        if twice:
            self.again = self.linear

    def forward(self, x):
        return getattr(self, "again", self.linear)(torch.tanh(self.linear(x)))


class Recurrent(Base):
    def __init__(self):
        super().__init__()
        self.cells = nn.RNN(4, 4, batch_first=True)

    def forward(self, x):
        return self.linear(self.cells(x[None])[0][0])


class Stash(Base):
    def __init__(self):
        super().__init__()
        self.last = torch.zeros(())

    def forward(self, x):
        hidden = torch.tanh(self.linear(x))
        self.last = hidden
        return hidden


class Counter(Base):
    """Its outputs depend on how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.linear(x) / self.calls)


class Counted(Counter):
    """Its outputs do not."""

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.linear(x))


class BufferCounter(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        # A copy: the next call writes to the buffer.
        return torch.tanh(self.linear(x) / self.calls.clone())


class Carry(Base):
    """As of a recurrent model that goes on where the call before left off."""

    def __init__(self):
        super().__init__()
        self.state = torch.zeros(4, dtype=torch.float64)

    def forward(self, x):
        outputs = torch.tanh(self.linear(x) + self.state)
        self.state = outputs.detach().mean(0)
        return outputs


class History(Base):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        outputs = torch.tanh(self.linear(x))
        self.seen.append(outputs.detach())
        return outputs


KEEPING = [Mask, LazyBuffer, Tables, Plain, Cached, Outside, Twice, Recurrent]
CHANGING = [Stash, Counter, Counted, BufferCounter, Carry, History]


def loss_fn(model, batch):
    return model(batch).square().mean()


def learner(model, **options):
    return metafast.MAML(model.double(), loss_fn, inner=SGD(lr=RATE), steps=STEPS, **options)


@pytest.fixture
def draw(generator):
    triangle.cache_clear()
    outside.clear()
    return lambda n=5: torch.randn(TASKS, n, 4, generator=generator, dtype=torch.float64)


def test_a_cache_that_is_frozen_is_emptied(draw):
    """As ``gc.freeze`` leaves the caches of all modules: the collector does not tell of them."""
    gc.collect()
    gc.freeze()
    x = draw()
    meta = learner(Cached(), capture=True)
    loss = meta(x, x)
    assert loss.isfinite()
    assert type(triangle(5)) is torch.Tensor
    assert gc.get_freeze_count() > 0
    torch.testing.assert_close(meta(x, x), loss)


def alive(model):
    """All tensors that a model's modules hold in any attribute."""
    seen = [
        getattr(model, "rotary", Rotary()).cosines,
        *getattr(model, "seen", []),
        *getattr(model, "tables", {}).values(),
    ]
    for module in model.modules():
        seen += [*vars(module).values(), *module._buffers.values(), *module._parameters.values()]
        seen += getattr(module, "_flat_weights", [])
    return [tensor for tensor in seen if isinstance(tensor, torch.Tensor)]


def is_ordinary(tensor):
    return type(tensor) in (torch.Tensor, nn.Parameter) and not functorch.is_functorch_wrapped_tensor(tensor)


def compare(meta, plain, support, query):
    """A call against the plain loop over ``plain``, which has the same parameters and goes the same way."""
    loss, found = meta_gradients(meta, support, query)
    expected = query_losses(plain, loss_fn, support, query, STEPS, RATE).mean()
    wanted = gradients(expected, plain.parameters())
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, list(wanted), rtol=1e-9, atol=1e-11)
    assert all(map(is_ordinary, alive(meta.model)))


@pytest.mark.parametrize("options", [{}, {"capture": True}, {"checkpoint": True}, {"task_batching": "loop"}], ids=str)
@pytest.mark.parametrize("kind", KEEPING)
def test_what_is_kept_is_as_an_ordinary_call_leaves_it(draw, caplog, kind, options):
    model = kind()
    parameters = list(model.parameters())
    plain = Twice(twice=False) if kind is Twice else kind()
    plain.load_state_dict(model.state_dict(), strict=False)
    meta, plain = learner(model, **options), plain.double()
    for n in (5, 5, 6):
        compare(meta, plain, draw(), draw(n))
        with torch.no_grad():
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                p.mul_(0.9)
                q.mul_(0.9)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    x = draw()[0]
    torch.testing.assert_close(model(x), plain(x))
    copy.deepcopy(model)
    learners = meta.adapt(draw())
    learners(draw())
    assert all(map(is_ordinary, alive(model)))
    one_by_one = kind is Recurrent or (kind is Outside and "task_batching" not in options)
    assert ("one after another" in caplog.text) == (one_by_one and options != {"task_batching": "loop"})


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"task_batching": "loop"}], ids=str)
@pytest.mark.parametrize("kind", CHANGING)
def test_what_changes_at_every_call_is_as_in_a_plain_loop(draw, caplog, kind, options):
    model = kind()
    meta, plain = learner(model, **options), copy.deepcopy(model).double()
    for _ in range(2):
        support, query = draw(), draw(6)
        compare(meta, plain, support, query)
        if hasattr(model, "calls"):
            assert model.calls == plain.calls
        if kind is Stash:
            torch.testing.assert_close(model.last, plain.last)
        if kind is Carry:
            torch.testing.assert_close(model.state, plain.state)
        if kind is History:
            assert len(model.seen) == len(plain.seen)
    dependent = kind in (Counter, BufferCounter, Carry)
    assert ("tasks have to come one after another" in caplog.text) == dependent
    if not options:
        assert ("tasks run one after another, since" in caplog.text) == (kind is not Stash)


@pytest.mark.parametrize("kind", [Counter, Counted, Carry, History])
def test_a_replay_that_would_not_change_it_is_refused(draw, kind):
    meta = learner(kind(), capture=True)
    with pytest.raises(
        NotRecordableError, match=r"every call of model and loss_fn leaves something else in (calls|state|seen)"
    ):
        meta(draw(), draw())
    assert all(map(is_ordinary, alive(meta.model)))
    meta.capture = False
    meta(draw(), draw()).backward()


@pytest.mark.parametrize("kind", [BufferCounter, Stash])
def test_replays_change_buffers_and_leave_tensors(draw, kind):
    model = kind()
    meta, plain = learner(model, capture=True), copy.deepcopy(model).double()
    for _ in range(4):
        compare(meta, plain, draw(), draw(6))
    if kind is Stash:
        torch.testing.assert_close(model.last, plain.last.detach())
        assert len(meta._step._capture._programs) == 1
    else:
        assert model.calls == plain.calls


class Weighted:
    """A loss with a table of its own."""

    def __init__(self):
        self.weights = None

    def loss(self, model, batch):
        if self.weights is None or len(self.weights) != len(batch):
            self.weights = batch.new_ones(len(batch)).cumsum(0)
        return (model(batch).square().mean(-1) * self.weights).mean()

    __call__ = loss


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("kind", ["object", "method", "partial"])
def test_what_a_loss_keeps(draw, kind, capture):
    def made():
        loss = Weighted()
        return {"object": loss, "method": loss.loss, "partial": functools.partial(Weighted.loss, loss)}[kind], loss

    (loss, holder), (own, _) = made(), made()
    model = Twice(twice=False).double()
    meta = metafast.MAML(model, loss, inner=SGD(lr=RATE), steps=STEPS, capture=capture)
    for n in (5, 5, 6):
        support, query = draw(), draw(n)
        found = meta_gradients(meta, support, query)
        expected = query_losses(model, own, support, query, STEPS, RATE).mean()
        torch.testing.assert_close(found[0], expected.detach())
        torch.testing.assert_close(found[1], list(gradients(expected, model.parameters())))
        assert is_ordinary(holder.weights)
        assert holder.weights.shape == (n,)


def test_weight_norm_by_hooks(draw):
    """It sets the weight as an attribute before each forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Stash().double()
        nn.utils.weight_norm(model.linear)
        meta = learner(model)
        compare(meta, model, draw(), draw())
    assert is_ordinary(model.linear.weight)


def test_hooks_that_keep_activations(draw, caplog):
    seen = []
    model = Cached()
    model.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    meta = learner(model)
    meta(draw(), draw()).backward()
    assert "the call puts tensors of single tasks into a list" in caplog.text
    assert len(seen) == TASKS * (STEPS + 1)
    assert all(map(is_ordinary, seen))


def test_vmap_insisted_on(draw):
    with pytest.raises(RuntimeError, match="task_batching='vmap': each call of the model changes calls"):
        learner(Counted(), task_batching="vmap")(draw(), draw())


def test_numbers_that_replays_would_not_see(draw):
    """A number in a closure is recorded once; the first replays find out."""
    factor = [1.0]

    def scaled(model, batch):
        return factor[0] * model(batch).square().mean()

    meta = metafast.MAML(Mask().double(), scaled, inner=SGD(lr=RATE), steps=STEPS, capture=True)
    meta(draw(), draw())
    factor[0] = 1.5
    with pytest.raises(RuntimeError, match="a replay differs from the uncaptured call, first in the loss, by"):
        meta(draw(), draw())
    # What differed is recorded anew.
    meta(draw(), draw()).backward()
    unchecked = metafast.MAML(Mask().double(), scaled, inner=SGD(lr=RATE), steps=STEPS, capture=True, capture_check=0)
    unchecked(draw(), draw())
    factor[0] = 1.0
    unchecked(draw(), draw())


def test_how_many_replays_are_compared(draw, monkeypatch):
    from metafast.engine import capture_check

    compared = []
    original = capture_check._compare
    monkeypatch.setattr(
        capture_check, "_compare", lambda *args, **named: (compared.append(1), original(*args, **named))
    )
    monkeypatch.setattr(capture_check, "_SHARE", 1e6)
    meta = learner(Mask(), capture=True)
    batch = draw(), draw()
    for count in (0, 0):
        meta(*batch)
        assert len(compared) == count
    for count in (1, 2, 2):
        meta(draw(), draw())
        assert len(compared) == count
    # Where it takes longer than recording, the first is enough.
    monkeypatch.setattr(capture_check, "_SHARE", 0.0)
    meta = learner(Mask(), capture=True)
    for count in (2, 3, 3):
        meta(draw(), draw())
        assert len(compared) == count


def test_dropout_and_batch_norm_beside_the_comparison(draw):
    """Neither the random state nor the buffers see it."""
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    results = []
    for check in (0, 2):
        meta = learner(copy.deepcopy(net), capture=True, capture_check=check)
        torch.manual_seed(3)
        batches = torch.randn(4, TASKS, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([meta_gradients(meta, *pair) for pair in zip(batches, batches.flip(0), strict=True)])
        results[-1] += [[b.clone() for b in meta.buffers()], torch.randn(3)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
