"""Inner loops that adapt the rows of an embedding that are looked up, beside the plain loop that adapts all, in float64."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from plain_learners import PlainLearner
from plain_loop import at, task
from some_cases import half
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import metafast
from metafast.engine import embedding_rows, embedding_table
from metafast.inner import SGD, Adam, AdamW, RMSprop

TASKS, EXAMPLES, LENGTH, STEPS, WORDS, WIDTH, WAYS = 3, 4, 5, 3, 60, 6, 3
RULES = {
    "sgd": SGD(lr=0.5),
    "momentum": SGD(lr=0.3, momentum=0.9, dampening=0.2),
    "nesterov": SGD(lr=0.3, momentum=0.9, nesterov=True),
    "clipped": SGD(lr=0.5, clip_norm=0.05),
    "clipped by value": SGD(lr=0.5, momentum=0.5, clip_value=0.01),
    "adam": Adam(lr=0.1, eps=0.1),
    "rmsprop": RMSprop(lr=0.1, eps=0.1, momentum=0.5, centered=True),
    "a rate per tensor": SGD(lr=0.5, learn={"lr": "tensor"}),
    "a rate per tensor and step": Adam(lr=0.1, eps=0.1, learn={"lr": "tensor_step"}),
}


@pytest.fixture(autouse=True)
def tables_are_large(monkeypatch):
    monkeypatch.setattr(embedding_table, "LEAST_ROWS", 16)


class Net(nn.Module):
    """Words, positions, and a few layers."""

    def __init__(self, **options):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, **options)
        self.places = nn.Embedding(20, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WAYS)

    def embedded(self, ids):
        return self.words(ids) + self.places(torch.arange(ids.shape[-1]))

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embedded(ids))).mean(-2))


class TwoLookUps(Net):
    """As an encoder and a decoder that share their embedding."""

    def embedded(self, ids):
        return super().embedded(ids) + torch.tanh(self.words(((ids * 7 + 3) % WORDS)[..., 1:]).mean(-2, keepdim=True))


class Checkpointed(Net):
    def forward(self, ids):
        hidden = torch.utils.checkpoint.checkpoint(super().embedded, ids, use_reentrant=False)
        return self.head(torch.tanh(self.inner(hidden)).mean(-2))


class PartlyWithoutGraph(Net):
    def embedded(self, ids):
        with torch.no_grad():
            constant = self.words((ids + 1) % WORDS)
        return super().embedded(ids) + constant


class Tied(Net):
    def forward(self, ids):
        hidden = torch.tanh(self.inner(self.embedded(ids))).mean(-2)
        return F.linear(hidden, self.words.weight)[..., :WAYS]


class Indexed(Net):
    def forward(self, ids):
        return super().forward(ids) + self.words.weight[:WAYS, 0]


class Listening(Net):
    """Asks what its weight is."""

    def embedded(self, ids):
        assert self.words.weight.shape == (WORDS, WIDTH)
        assert self.words.weight.dtype == torch.float64
        assert self.words.weight.device.type == "cpu"
        assert self.words.weight.is_floating_point()
        return super().embedded(ids).to(self.words.weight.dtype)


class Counting(Net):
    """Looks up other words at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def embedded(self, ids):
        self.calls += 1
        return super().embedded((ids + self.calls) % WORDS)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(examples=EXAMPLES, words=WORDS):
    return torch.randint(words, (TASKS, examples, LENGTH)), torch.randint(WAYS, (TASKS, examples))


def learner(model, rule=RULES["sgd"], kind=metafast.MAML, **options):
    torch.manual_seed(0)
    return kind(model.double(), loss_fn, inner=rule, steps=STEPS, **options)


def check_against_the_plain_loop(meta, per_step=False, tolerance=1e-10):
    """Value, gradients and adapted models of two calls."""
    for _ in range(2):
        # The support sets know few words, and query sets others as well.
        sets = [batch(words=WORDS // 2) for _ in range(STEPS if per_step else 1)]
        query = batch()
        support = metafast.PerStep(sets) if per_step else sets[0]
        steps = sets if per_step else sets * STEPS
        plain = PlainLearner(meta)
        expected_loss, expected, _ = plain(steps, query, None)
        meta.zero_grad()
        loss = meta(support, query)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected_loss, rtol=tolerance, atol=tolerance)
        for name, gradient in expected.items():
            p = meta.get_parameter(name)
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(grad, gradient, rtol=tolerance, atol=tolerance, msg=name)
        learners, adapted = meta.adapt(support), plain.adapt(steps, STEPS)
        outputs = [at(plain.model, own)(task(query[0], index)) for index, own in enumerate(adapted)]
        torch.testing.assert_close(learners(query[0]), torch.stack(outputs), rtol=tolerance, atol=tolerance)
        for index, own in enumerate(adapted):
            state = learners.model(index).state_dict()
            for name, p in own.items():
                torch.testing.assert_close(state[name], p, rtol=tolerance, atol=tolerance, msg=name)
                of_tasks = learners.params.get(name)
                found = state[name] if of_tasks is None else of_tasks[index]
                torch.testing.assert_close(found, p, rtol=tolerance, atol=tolerance, msg=name)
        with torch.no_grad():
            for p in meta.model.parameters():
                p.add_(0.1 * torch.randn_like(p))


def adapts_rows(meta, name="words.weight"):
    """Whether the embedding of this name is adapted by rows."""
    return isinstance(meta.adapt(batch())._params[name], embedding_rows.Rows)


WAYS_TO_RUN = [{}, {"checkpoint": True}, {"capture": True}, {"task_batching": "loop"}]


@pytest.mark.parametrize(
    ("rule", "options", "per_step"), half(itertools.product(RULES, WAYS_TO_RUN, [False, True])), ids=str
)
def test_rules_and_options(rule, options, per_step):
    meta = learner(Net(), RULES[rule], **options)
    check_against_the_plain_loop(meta, per_step)
    assert adapts_rows(meta)
    assert adapts_rows(meta, "places.weight")


@pytest.mark.parametrize(
    "options",
    [{"tasks_per_chunk": 1}, {"tasks_per_chunk": 2, "capture": True}, {"order": 1}, {"step_weights": [0.5, 0.0, 1.0]}],
    ids=str,
)
@pytest.mark.parametrize(
    "model", [Net, lambda: Net(padding_idx=2), lambda: Net(padding_idx=-1)], ids=["plain", "2", "-1"]
)
def test_more_options_and_padding(model, options):
    meta = learner(model(), **options)
    check_against_the_plain_loop(meta)
    assert adapts_rows(meta)


class DenseGradients(TorchDispatchMode):
    """Counts the gradients that are made as large as the table."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func in (torch.ops.aten.embedding_dense_backward.default, torch.ops.aten._to_dense.default)
        self.count += made and tuple(out.shape) == (WORDS, WIDTH)
        return out


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"task_batching": "loop"}], ids=str)
@pytest.mark.parametrize("model", [Net, TwoLookUps])
def test_chunks_make_one_dense_gradient_of_a_table(model, options):
    """At the end, of all tasks."""
    meta = learner(model(), tasks_per_chunk=1, **options)
    check_against_the_plain_loop(meta)
    support, query = batch(examples=2), batch(examples=2)
    with DenseGradients() as dense:
        loss = meta(support, query)
    assert dense.count == 1
    meta.zero_grad()
    loss.backward()
    assert not meta.model.words.weight.grad.is_sparse


def test_an_embedding_that_is_made_sparse_keeps_its_gradient_so():
    model = Net(sparse=True)
    meta = learner(model, adapt_parameters=["head.*"], task_batching="loop", tasks_per_chunk=1)
    support, query = batch(), batch()
    expected = PlainLearner(meta)([support] * STEPS, query, None)[1]["model.words.weight"]
    meta(support, query).backward()
    assert model.words.weight.grad.is_sparse
    torch.testing.assert_close(model.words.weight.grad.to_dense(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"capture": True}, {"task_batching": "loop"}], ids=str)
@pytest.mark.parametrize("model", [TwoLookUps, PartlyWithoutGraph, Listening])
def test_models(model, options):
    meta = learner(model(), Adam(lr=0.1, eps=0.1), **options)
    check_against_the_plain_loop(meta)
    assert adapts_rows(meta)


def test_look_ups_that_the_model_checkpoints():
    check_against_the_plain_loop(learner(Checkpointed()))


def test_frozen_parameters_and_chosen_ones():
    model = Net()
    model.places.weight.requires_grad_(False)
    meta = learner(model, adapt_parameters=["words.*", "head.*"])
    check_against_the_plain_loop(meta)
    assert adapts_rows(meta)


@pytest.mark.parametrize("options", [{}, {"capture": True}, {"checkpoint": True}, {"task_batching": "loop"}], ids=str)
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Tied, "the model reads it by linear"),
        (Indexed, "the model reads it by __getitem__"),
    ],
)
def test_other_readings_adapt_the_whole_table(model, reason, options, caplog):
    meta = learner(model(), **options)
    with caplog.at_level(logging.INFO, "metafast"):
        check_against_the_plain_loop(meta)
    assert [r.getMessage().partition(", since ")[2] for r in caplog.records if "as a whole" in r.getMessage()] == [
        f"{reason}, and not by torch.nn.functional.embedding alone"
    ]
    assert not adapts_rows(meta)
    assert adapts_rows(meta, "places.weight")


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (SGD(lr=0.5, weight_decay=0.1), {}),
        (AdamW(lr=0.1, eps=0.1), {}),
        (SGD(lr=0.5, learn={"weight_decay": "number"}), {}),
        (SGD(lr=0.5, learn={"lr": "parameter"}), {}),
        (SGD(lr=0.5), {"micro_batches": 2}),
    ],
    ids=str,
)
def test_what_moves_all_rows_adapts_the_whole_table(rule, options):
    meta = learner(Net(), rule, **options)
    check_against_the_plain_loop(meta)
    assert not adapts_rows(meta)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_that_look_at_all_rows(options):
    meta = learner(Net(**options))
    assert not adapts_rows(meta)
    assert adapts_rows(meta, "places.weight")


def test_hooks_of_the_weight():
    model = Net()
    model.words.weight.register_hook(lambda grad: 2 * grad)
    assert not adapts_rows(learner(model))


@pytest.mark.parametrize("options", [{}, {"capture": True, "capture_check": 0}, {"tasks_per_chunk": 1}], ids=str)
def test_other_words_in_later_steps(options, caplog):
    """Random words are no words of the steps before: the call is made again with the whole table."""
    support, query = batch(), batch()

    class Masking(Net):
        def embedded(self, ids):
            return super().embedded(torch.where(torch.rand(ids.shape) < 0.5, torch.randint(WORDS, ids.shape), ids))

    model = Masking()
    meta = learner(model, **options)
    with caplog.at_level(logging.INFO, "metafast"):
        torch.manual_seed(1)
        loss = meta(support, query)
    assert "words.weight is adapted as a whole, since the model looks up other rows in later steps" in caplog.text
    if not options:
        expected = learner(model, micro_batches=1)
        expected._whole_tables = ("words.weight",)
        torch.manual_seed(1)
        assert torch.equal(loss, expected(support, query))
    assert not adapts_rows(meta)
    assert adapts_rows(meta, "places.weight")


def test_a_support_set_with_more_positions_than_rows():
    support = torch.randint(WORDS, (TASKS, 13, LENGTH)), torch.randint(WAYS, (TASKS, 13))
    meta = learner(Net())
    meta(support, batch())
    assert not adapts_rows(meta)


def test_learners_keep_the_rows_that_they_have_not_adapted():
    meta = learner(Net())
    support, query = batch(words=10), batch()
    learners = meta.adapt(support)
    before = learners(query[0])
    with torch.no_grad():
        meta.model.words.weight.add_(1.0)
    assert torch.equal(learners(query[0]), before)


def test_other_algorithms():
    for kind, rows in ((metafast.MAMLPlusPlus, True), (metafast.Reptile, False), (metafast.IMAML, False)):
        meta = learner(Net(), kind=kind)
        meta(batch(), batch()).backward()
        assert adapts_rows(meta) == rows
    meta = metafast.ProtoMAML(Net().double(), loss_fn, ways=WAYS, inner=SGD(lr=0.1), steps=2)
    support, query = batch(), batch()
    support[1][:, :WAYS] = torch.arange(WAYS)
    expected = PlainLearner(meta)([support] * 2, query, None)[1]
    meta(support, query).backward()
    for name, p in meta.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-10)
    assert isinstance(meta.adapt(support)._params["body.words.weight"], embedding_rows.Rows)


def test_memory_is_that_of_the_rows():
    """No tensor of tasks and words is made, in a call, its backward pass and an adaptation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(r.untyped_storage().nbytes() for r in (result,) if isinstance(r, torch.Tensor))
            return result

    model = Net()
    model.words = nn.Embedding(5000, WIDTH)
    meta = learner(model, Adam(lr=0.1, eps=0.1))
    support, query = batch(), batch()
    with Sizes():
        meta(support, query).backward()
        meta.adapt(support)(query[0])
    assert max(sizes) == model.words.weight.nbytes
