"""capture=True against the same learner without it, in float64: losses, outcomes and gradients are equal, bit by bit.

Tasks' losses are summed: the mean would divide gradients after the backward pass instead of before, and round once more.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metafast
from metafast.engine import capture as capture_module
from metafast.engine import memory_budget as memory
from metafast.inner import SGD, Adam, AdamW, RMSprop
from metafast.program import NotRecordableError

TASKS, STEPS = 3, 2


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def normed():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()


def dropping():
    return nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 2)).double()


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def loss_and_metric(model, batch):
    outputs = model(batch[0])
    return F.mse_loss(outputs, batch[1]), {"off": (outputs - batch[1]).abs().amax(0)}


def classified(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def draw(generator):
    def draw(shots=4, tasks=TASKS):
        return tuple(torch.randn(tasks, shots, size, generator=generator, dtype=torch.float64) for size in (3, 2))

    return draw


@pytest.fixture
def classes(generator):
    def draw(shots=4):
        x = torch.randn(TASKS, shots, 3, generator=generator, dtype=torch.float64)
        return x, torch.arange(shots).remainder(2).expand(TASKS, shots)

    return draw


@pytest.fixture
def recordings(monkeypatch):
    """The names of programs, in the order of recording."""
    names = []
    original = capture_module.Capture._recorded

    def recorded(self, name, call, inputs):
        names.append(name)
        return original(self, name, call, inputs)

    monkeypatch.setattr(capture_module.Capture, "_recorded", recorded)
    return names


def learner(net=None, loss_fn=loss_fn, kind=metafast.MAML, **options):
    return kind(
        net or mlp(), loss_fn, **{"inner": SGD(lr=0.1), "steps": STEPS, "reduction": "sum", "capture": True, **options}
    )


def twins(meta):
    """A learner, and one with the same parameters that does not capture."""
    plain = copy.deepcopy(meta)
    plain.capture = False
    return meta, plain


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def called(meta, *batches, backward=True, **options):
    meta.zero_grad()
    loss = meta(*batches, **options)
    if backward:
        loss.backward()
    memory = meta.outcome.memory
    # A captured step is measured on one task: the same choice follows.
    outcome = meta.outcome._replace(memory=memory and memory[:2])
    return loss.detach(), outcome, {name: p.grad for name, p in meta.named_parameters()}


def agree(meta, plain, batches, same=same, **options):
    """A call with each of ``batches``, an optimizer step after it, in both."""
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (meta, plain)]
    losses = []
    for batch in batches:
        results = []
        for m, optimizer in zip((meta, plain), optimizers, strict=True):
            results.append(called(m, *batch, **options))
            optimizer.step()
        same(*results)
        losses.append(results[0][0].item())
    for (name, found), expected in zip(meta.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert len(set(losses)) == len(losses)


OPTIONS = {
    "order 1": {"order": 1},
    "order 2": {},
    "checkpoint": {"checkpoint": True},
    "chunks": {"tasks_per_chunk": 2},
    "chunks, checkpoint": {"tasks_per_chunk": 2, "checkpoint": True},
    "loop": {"task_batching": "loop"},
    "micro batches": {"micro_batches": 2},
    "micro batches, checkpoint": {"micro_batches": 2, "checkpoint": True},
    "step weights": {"step_weights": [0.5, 1.0]},
    "no steps": {"steps": 0},
    "momentum": {"inner": SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.02)},
    "clipped": {"inner": SGD(lr=0.1, clip_norm=0.3)},
    "Adam": {"inner": Adam(lr=0.05, eps=1e-3, amsgrad=True)},
    "AdamW, learned": {"inner": AdamW(lr=0.05, eps=1e-3, learn={"lr": "step", "weight_decay": "number"})},
    "RMSprop, learned": {"inner": RMSprop(lr=0.05, eps=1e-3, momentum=0.5, learn={"lr": "tensor"})},
    "parameter rates": {"inner": SGD(lr=0.1, learn={"lr": "parameter_step"}, learn_log=True)},
    "part": {"adapt_parameters": "2.*"},
    "MetaSGD": {"kind": metafast.MetaSGD},
    "iMAML": {"kind": metafast.IMAML, "proximal": 2.0},
    "iMAML, Neumann": {"kind": metafast.IMAML, "proximal": 5.0, "solver": "neumann", "adapt_parameters": "2.*"},
    "ANIL": {"kind": metafast.ANIL, "head": "2.*"},
    "Reptile": {"kind": metafast.Reptile},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_calls_and_adaptation(draw, generator, recordings, options):
    meta, plain = twins(learner(**options))
    weights = torch.rand(TASKS, generator=generator)
    agree(meta, plain, [(draw(), draw(5)) for _ in range(3)], task_weights=weights)
    assert len(recordings) == (2 if "tasks_per_chunk" in options else 1)  # of 3 tasks, 2 and 1
    support = draw()
    same(meta.adapt(support).params, plain.adapt(support).params)


@pytest.mark.parametrize(
    ("option", "name"), [("momentum", "sgd"), ("MetaSGD", "sgd"), ("Adam", "adam"), ("RMSprop, learned", "rmsprop")]
)
@pytest.mark.usefixtures("fused_cpu")
def test_updates_write_into_the_memory_of_the_program(draw, option, name):
    """Bit by bit what they return without capture, as above: no copies of their results are made."""
    meta = learner(**OPTIONS[option])
    meta(draw(), draw()).backward()
    (program,) = (kept.program for kept in meta._step._capture._programs.values())
    updates = {str(op) for call in program._calls for op in (call.func, *call.args[:1]) if "update" in str(op)}
    assert updates == {f"metafast.{name}_update.out", f"metafast.{name}_update_vjp.out"}


def test_the_mean_over_tasks(draw):
    meta, plain = twins(learner(reduction="mean"))
    agree(meta, plain, [(draw(), draw(5)) for _ in range(3)], same=close)


@pytest.mark.parametrize("options", [{}, {"tasks_per_chunk": 2}])
def test_reptile_without_query(draw, options):
    meta, plain = twins(learner(kind=metafast.Reptile, **options))
    agree(meta, plain, [(draw(), None) for _ in range(3)])
    assert meta.outcome.query_losses is None


@pytest.mark.parametrize("kind", [metafast.ProtoNet, metafast.ProtoMAML])
def test_prototypes(classes, recordings, kind):
    options = {} if kind is metafast.ProtoNet else {"inner": SGD(lr=0.1), "steps": STEPS}
    meta, plain = twins(kind(mlp(), classified, ways=2, reduction="sum", capture=True, **options))
    agree(meta, plain, [(classes(), classes(6)) for _ in range(3)])
    support, query = classes(), classes()
    same(meta.adapt(support)(query[0]), plain.adapt(support)(query[0]))
    assert Counter(recordings) == {"step": 1, "adapt 0" if kind is metafast.ProtoNet else f"adapt {STEPS}": 1}


def test_a_support_batch_a_step(draw):
    meta, plain = twins(learner())
    agree(meta, plain, [(metafast.PerStep([draw(), draw(6)]), draw()) for _ in range(3)])
    support = metafast.PerStep([draw(), draw(6)])
    same(meta.adapt(support).params, plain.adapt(support).params)


def test_epochs_of_maml_plus_plus(draw, recordings):
    """Order and weights are of the epoch, not of the one in which a program was recorded."""
    meta, plain = twins(learner(kind=metafast.MAMLPlusPlus, multi_step_epochs=2, first_order_epochs=1))
    for _ in range(3):
        agree(meta, plain, [(draw(), draw()) for _ in range(2)])
        meta.next_epoch(), plain.next_epoch()
    assert len(recordings) == 3


def test_adaptation_of_another_length(draw, recordings):
    meta, plain = twins(learner(inner=SGD(lr=0.1, learn={"lr": "step"})))
    for steps in (4, 0, 4):
        support, inputs = draw(), draw()[0]
        found, expected = (m.adapt(support, steps=steps) for m in (meta, plain))
        same(found.params, expected.params)
        same(found(inputs), expected(inputs))
    assert recordings == ["adapt 4", "adapt 0"]


def test_adapted_parameters_are_the_callers_own(draw):
    meta = learner()
    learners = meta.adapt(draw())
    before = copy.deepcopy(learners.params)
    meta.adapt(draw())
    same(learners.params, before)
    weight = next(iter(learners.params.values())).requires_grad_()
    (weight**2).sum().backward()
    same(weight.grad, 2 * weight.detach())


CHANGES = {
    "order": lambda meta: setattr(meta, "order", 1),
    "eval": lambda meta: meta.eval(),
    "inner eval": lambda meta: meta.model[1].eval(),
    "frozen": lambda meta: meta.model[0].weight.requires_grad_(False),
    "inner rule": lambda meta: setattr(meta, "inner", SGD(lr=0.3)),
    "setting of a submodule": lambda meta: setattr(meta.model[1], "momentum", 0.5),
    "another submodule": lambda meta: meta.model.__setitem__(2, nn.Sigmoid()),
    "a hook": lambda meta: meta.model[0].register_forward_hook(lambda module, inputs, output: 2 * output),
    "checkpoint": lambda meta: setattr(meta, "checkpoint", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_between_calls_are_seen(draw, recordings, change):
    meta, plain = twins(learner(normed(), steps=1, task_batching="loop", adapt_parameters="3.*"))
    agree(meta, plain, [(draw(tasks=1), draw(tasks=1))])
    change(meta), change(plain)
    agree(meta, plain, [(draw(tasks=1), draw(tasks=1)) for _ in range(2)])
    assert len(recordings) == 2


def test_back_and_forth_uses_what_was_recorded(draw, recordings):
    meta, plain = twins(learner(normed(), steps=1, task_batching="loop"))
    for _ in range(2):
        meta.train(), plain.train()
        agree(meta, plain, [(draw(tasks=1), draw(tasks=1))])
        meta.eval(), plain.eval()
        agree(meta, plain, [(draw(tasks=1), draw(tasks=1))])
    assert len(recordings) == 2


def test_parameters_are_read_where_they_are(draw, recordings):
    """A replay neither copies them nor holds a copy; the optimizer changes them in place."""
    meta, plain = twins(learner(steps=1))
    agree(meta, plain, [(draw(), draw()) for _ in range(3)])
    assert recordings == ["step"]
    own = {p.data_ptr() for p in meta.model.parameters()}
    for kept in meta._step._capture._programs.values():
        assert own <= {tensor.data_ptr() for tensor in kept.program._inputs}


def test_parameters_that_move_in_memory(draw, recordings):
    """Copied from the first move on, whatever it takes; what others hold of the old ones stays as it was."""
    meta, plain = twins(learner(steps=1))
    for _ in range(4):
        agree(meta, plain, [(draw(), draw())])
        old = [p.data for p in meta.parameters()]
        kept = [tensor.clone() for tensor in old]
        for ours, theirs in zip(meta.parameters(), plain.parameters(), strict=True):
            ours.data = ours.data + 0.1
            theirs.data = theirs.data + 0.1
        agree(meta, plain, [(draw(), draw())])
        same(old, kept)
    assert recordings == ["step"] * 2


def test_new_shapes(draw, recordings):
    meta, plain = twins(learner())
    for shots, tasks in ((4, 3), (6, 3), (4, 2), (4, 3)):
        agree(meta, plain, [(draw(shots, tasks), draw(5, tasks))])
    assert len(recordings) == 3


def test_without_gradients(draw, recordings):
    meta, plain = twins(learner())
    for _ in range(2):
        support, query = draw(), draw()
        with torch.no_grad():
            same(*(called(m, support, query, backward=False) for m in (meta, plain)))
            assert not meta(support, query).requires_grad
        agree(meta, plain, [(support, query)])
    assert len(recordings) == 2


@pytest.mark.parametrize(("free", "rebuilt"), [(2**40, False), (2**10, True)])
@pytest.mark.parametrize("kind", [metafast.MAML, metafast.ProtoMAML])
def test_auto_checkpoint(draw, classes, monkeypatch, caplog, free, rebuilt, kind):
    """It decides as without capture, and what it tries for that leaves no trace in buffers."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    options = {"ways": 2} if kind is metafast.ProtoMAML else {}
    own = classified if options else loss_fn
    meta, plain = twins(learner(normed(), own, kind=kind, steps=1, checkpoint="auto", task_batching="loop", **options))
    with caplog.at_level(logging.INFO, "metafast"):
        agree(meta, plain, [(classes(), classes(6)) if options else (draw(), draw(6)) for _ in range(2)])
    assert caplog.text.count(f"the last {0 if rebuilt else 1} of 1 inner steps") == 2  # once a learner


class Shared(nn.Module):
    """Tied, frozen and unused parameters, and a buffer that is bound anew."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
            self.calls += 1
        return self.frozen(torch.tanh(self.second(torch.tanh(self.first(x)) - self.seen)))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_tied_frozen_unused_and_rebound(draw, checkpoint):
    meta, plain = twins(learner(Shared().double(), task_batching="loop", checkpoint=checkpoint))
    agree(meta, plain, [(draw(), draw()) for _ in range(3)])
    assert meta.model.calls == 3 * TASKS * (STEPS + 1)
    assert meta.model.unused.grad is None or not meta.model.unused.grad.any()
    assert meta.model.frozen.weight.grad is None
    before = copy.deepcopy(meta.state_dict())
    meta.adapt(draw())
    same(dict(meta.state_dict()), dict(before))


def test_metrics(draw):
    meta, plain = twins(learner(loss_fn=loss_and_metric, tasks_per_chunk=2))
    agree(meta, plain, [(draw(), draw()) for _ in range(2)])
    assert meta.outcome.metrics["off"].shape == (TASKS, 2)


def test_losses_that_are_not_finite(draw, recordings):
    meta, plain = twins(learner(normed(), steps=1, on_nonfinite="skip", task_batching="loop"))
    for bad in (None, 1, 0):
        support, query = draw(), draw()
        if bad is not None:
            support[0][bad, 0, 0] = torch.nan
        agree(meta, plain, [(support, query)])
        assert meta.outcome.skipped == (() if bad is None else (bad,))
    assert len(recordings) == 2  # 3 tasks and 2
    meta.on_nonfinite = "raise"
    with pytest.raises(FloatingPointError, match="support loss: expected finite values, got nan in task 0"):
        meta(support, query)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_running_statistics(draw, checkpoint):
    meta, plain = twins(learner(normed(), task_batching="loop", checkpoint=checkpoint))
    agree(meta, plain, [(draw(6), draw()) for _ in range(3)])
    assert meta.model[1].num_batches_tracked == 3 * TASKS * (STEPS + 1)
    before = copy.deepcopy(dict(meta.named_buffers()))
    support = draw(6)
    same(meta.adapt(support).params, plain.adapt(support).params)
    same(dict(meta.named_buffers()), before)


def test_buffers_that_stay_are_left_alone(draw):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2).double()
            # Cannot be written to.
            self.register_buffer("scale", torch.full((1,), 2.0, dtype=torch.float64).expand(2))

        def forward(self, x):
            return self.layer(x) * self.scale

    meta, plain = twins(learner(Scaled()))
    version = meta.model.scale._version
    agree(meta, plain, [(draw(), draw()) for _ in range(2)])
    assert meta.model.scale._version == version


@pytest.mark.parametrize("task_batching", ["vmap", "loop"])
def test_dropout_draws_anew(draw, task_batching):
    meta, plain = twins(learner(dropping(), task_batching=task_batching))
    support, query = draw(), draw()
    losses = [meta(support, query).item() for _ in range(3)]
    assert len(set(losses)) == 3
    torch.manual_seed(5)
    again = [meta(support, query).item() for _ in range(2)]
    # As without capture, with which a recording must not draw either.
    fresh = copy.deepcopy(meta)
    for other in (meta, plain, fresh):
        torch.manual_seed(5)
        assert [other(support, query).item() for _ in range(2)] == again


def test_dropout_that_is_recomputed(draw):
    meta = learner(dropping(), checkpoint=True)
    with pytest.raises(NotRecordableError, match=r"random numbers .* without checkpointing or dropout"):
        meta(draw(), draw())
    meta.eval()
    agree(*twins(meta), [(draw(), draw()) for _ in range(2)])


def test_python_that_looks_at_values(draw):
    def branching(model, batch):
        loss = loss_fn(model, batch)
        return loss if loss > 1 else 2 * loss

    with pytest.raises(NotRecordableError, match="depends on the values of tensors in Python"):
        learner(loss_fn=branching, task_batching="loop")(draw(), draw())
    with pytest.raises(NotRecordableError, match="depends on the values of tensors in Python"):
        learner(loss_fn=lambda model, batch: loss_fn(model, batch) * batch[0].sum().item())(draw(), draw())


@pytest.mark.parametrize(
    "look", [torch.Tensor.item, float, bool, torch.Tensor.tolist, lambda scale: float(scale.numpy())]
)
def test_python_that_looks_at_tensors_of_its_own(draw, look):
    scale = torch.tensor(2.0, dtype=torch.float64)
    with pytest.raises(NotRecordableError, match="depends on the values of tensors in Python"):
        learner(loss_fn=lambda model, batch: loss_fn(model, batch) * look(scale))(draw(), draw())


def test_gradients_that_would_be_lost(draw):
    support, query = draw(), draw()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    meta = learner(loss_fn=lambda model, batch: scale * loss_fn(model, batch))
    with pytest.raises(NotRecordableError, match="requires a gradient and is no parameter of the learner"):
        meta(support, query)
    with torch.no_grad():
        same(*(m(support, query) for m in twins(meta)))
    with pytest.raises(ValueError, match="support, query: with capture or tasks_per_chunk only parameters"):
        learner()((support[0].requires_grad_(), support[1]), query)


def test_tensors_of_the_loss_are_read_live(draw):
    weights = torch.ones(2, dtype=torch.float64)

    def weighted(model, batch):
        return (weights * (model(batch[0]) - batch[1]) ** 2).mean()

    meta, plain = twins(learner(loss_fn=weighted))
    agree(meta, plain, [(draw(), draw())])
    weights.mul_(torch.tensor([3.0, 0.5]))
    agree(meta, plain, [(draw(), draw())])


class Compiled(nn.Module):
    """A function between its layers that torch.compile made."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5).double(), nn.Linear(5, 2).double()
        self.between = torch.compile(lambda x: torch.tanh(x) * 2 + x.amax(-1, keepdim=True), backend="eager")

    def forward(self, x):
        return self.last(self.between(self.first(x)))


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_compiled_functions_are_recorded_as_they_were_written(draw):
    model = Compiled()
    # A compiled function cannot be copied.
    meta, plain = learner(model), learner(model, capture=False)
    for shots in (4, 1, 7, 7):
        batches = draw(shots), draw(shots)
        same(called(meta, *batches)[::2], called(plain, *batches)[::2])


def test_copies_and_pickles(draw, recordings):
    meta, plain = twins(learner())
    agree(meta, plain, [(draw(), draw()) for _ in range(2)])
    support, query = draw(), draw()
    expected = called(meta, support, query)
    for other in (copy.deepcopy(meta), pickle.loads(pickle.dumps(meta))):
        with torch.no_grad():
            other.model[0].weight += 1
        assert called(other, support, query)[0] != expected[0]
        other.load_state_dict(meta.state_dict())
        same(called(other, support, query), expected)
    assert len(recordings) == 3
    same(called(meta, support, query), expected)


def test_nothing_is_saved(draw):
    meta, plain = twins(learner(normed(), task_batching="loop"))
    agree(meta, plain, [(draw(), draw())])
    assert list(meta.state_dict()) == list(plain.state_dict())
    assert not any("fake" in type(tensor).__name__.lower() for tensor in meta.state_dict().values())


def test_autocast(draw):
    meta, plain = twins(learner(mlp().float()))
    for _ in range(2):
        batches = [tuple(x.float() for x in draw()) for _ in range(2)]
        results = []
        for m in (meta, plain):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                m.zero_grad()
                loss = m(*batches)
            loss.backward()
            results.append((loss.detach(), [p.grad for p in m.parameters()]))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        full = called(plain, *batches)[0]
        assert results[0][0] != full
        same(called(meta, *batches)[0], full)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x), src_key_padding_mask=x == 0).mean(1))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.usefixtures("fused_cpu")
def test_transformer_with_padding(generator, checkpoint):
    def draw():
        x = torch.randint(1, 11, (TASKS, 4, 6), generator=generator)
        x[torch.arange(6) >= torch.randint(2, 7, (TASKS, 4, 1), generator=generator)] = 0
        return x, torch.randint(0, 4, (TASKS, 4), generator=generator)

    meta, plain = twins(learner(Encoder().double(), classified, steps=1, checkpoint=checkpoint))
    for _ in range(3):
        batches = draw(), draw()
        close(called(meta, *batches), called(plain, *batches))
        torch.optim.SGD(meta.parameters(), 0.1).step(), torch.optim.SGD(plain.parameters(), 0.1).step()
    support, query = draw(), draw()
    close(meta.adapt(support)(query[0]), plain.adapt(support)(query[0]))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers")
@pytest.mark.usefixtures("fused_cpu")
def test_hugging_face(generator):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from metafast.integrations import huggingface

    huggingface.register()
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 12}
    config = transformers.BertConfig(
        **sizes, vocab_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config).double()
    model.set_attn_implementation("metafast")

    def loss(net, batch):
        return F.cross_entropy(net(input_ids=batch[0], attention_mask=batch[1]).logits, batch[2])

    def draw():
        padding = (torch.arange(6) < torch.randint(2, 7, (2, 4, 1), generator=generator)).long()
        ids = torch.randint(1, 20, (2, 4, 6), generator=generator)
        return ids, padding, torch.randint(0, 2, (2, 4), generator=generator)

    meta, plain = twins(learner(model, loss, steps=1))
    for _ in range(2):
        batches = draw(), draw()
        close(called(meta, *batches), called(plain, *batches))


def test_a_convolution_and_its_gradients(generator):
    """Gradients that are not asked for are no results."""
    net = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, 2)
    )
    shapes = ((TASKS, 4, 2, 6), (TASKS, 4, 2))
    meta, plain = twins(learner(net.double()))
    for _ in range(3):
        batches = [
            tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes) for _ in range(2)
        ]
        close(called(meta, *batches), called(plain, *batches))


def test_what_capture_must_be():
    with pytest.raises(TypeError, match="capture: expected True or False, got str"):
        learner(capture="yes")


def test_old_programs_are_dropped(draw, recordings, monkeypatch):
    monkeypatch.setattr(capture_module, "KEPT", 2)
    meta = learner(steps=1)
    for shots in (2, 3, 2, 4, 2, 3):
        meta(draw(shots), draw())
    assert len(meta._step._capture._programs) == 2
    assert len(recordings) == 4  # 3 went when 4 came: the least recently used


def test_50_calls_keep_nothing(draw):
    meta = learner(normed(), steps=1, task_batching="loop")
    support, query = draw(), draw()

    def tensors_after(count):
        for _ in range(count):
            meta.zero_grad()
            meta(support, query).backward()
            meta.adapt(support)
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    tensors_after(2)
    gc.collect()
    gc.disable()  # what only the collector would free counts as growth
    try:
        first = tensors_after(2)
        assert tensors_after(50) <= first
    finally:
        gc.enable()


def test_settings_in_containers_and_ties_are_looked_at_again():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
            self.c = nn.Linear(3, 3).double()
            self.c.weight = self.a.weight
            self.scales = [1.0, 2.0]

        def forward(self, x):
            return self.c(self.b(self.a(x)) * self.scales[1])

    net = Net()

    def loss(model, batch):
        return model(batch[0]).pow(2).mean()

    learners = [
        metafast.MAML(net, loss, inner=SGD(lr=0.1), steps=STEPS, reduction="sum", capture=capture)
        for capture in (True, False)
    ]
    batch = (torch.randn(TASKS, 4, 3, dtype=torch.float64),)

    def total(learner):
        return learner(batch, batch).detach()

    assert torch.equal(*map(total, learners))
    net.scales[1] = 3.0
    assert torch.equal(*map(total, learners))
    net.c.weight = net.b.weight
    assert torch.equal(*map(total, learners))
