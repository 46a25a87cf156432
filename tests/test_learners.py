"""Learners as people use them: adapted models called and taken apart, and models that change between calls."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from plain_loop import distance, gradients, meta_gradients, query_losses
from torch import nn

import metafast
from metafast.inner import SGD

TASKS, STEPS, LR = 3, 2, 0.1


class Scaled(nn.Module):
    """A model with keyword arguments, by task and for all."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, shift=None, *, power=1):
        hidden = torch.tanh(self.body(x) if shift is None else self.body(x) + shift)
        return self.head(hidden**power)


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.fixture
def net(generator):
    return Scaled().double()


@pytest.fixture
def draw(generator):
    def draw(shots=4):
        return tuple(torch.randn(TASKS, shots, size, generator=generator, dtype=torch.float64) for size in (3, 2))

    return draw


def maml(net, **options):
    return metafast.MAML(net, loss_fn, **{"inner": SGD(lr=LR), "steps": STEPS, **options})


@pytest.mark.parametrize("task_batching", ["vmap", "loop"])
def test_keyword_arguments(net, draw, generator, task_batching):
    learners = maml(net, task_batching=task_batching).adapt(draw())
    x, shift = draw()[0], torch.randn(TASKS, 4, 4, generator=generator, dtype=torch.float64)
    found = learners(x, shift=shift, power=2)
    for task in range(TASKS):
        torch.testing.assert_close(found[task], learners.model(task)(x[task], shift=shift[task], power=2))
    with pytest.raises(ValueError, match="shift: expected 3 tasks, as many as were adapted to, got 2"):
        learners(x, shift=shift[:2])


def test_one_task_as_a_module(net, draw):
    support, (x, _) = draw(), draw()
    learners = maml(net, adapt_parameters="head.*").adapt(support)
    before = copy.deepcopy(net.state_dict())
    model = learners.model(1)
    torch.testing.assert_close(model(x[1]), learners(x)[1])
    assert torch.equal(model.head.weight, learners.params["head.weight"][1])
    with torch.no_grad():
        model.body.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(IndexError):
        learners.model(TASKS)


def test_learners_that_are_more_than_a_model(draw):
    support = draw()[0], torch.tensor([[0, 0, 1, 1]]).expand(TASKS, -1)
    learners = metafast.ProtoNet(nn.Linear(3, 2).double(), loss_fn, ways=2).adapt(support)
    assert torch.equal(learners(input=support[0]), learners(support[0]))
    with pytest.raises(ValueError, match="model: the learners have present, prototypes beside the model's parameters"):
        learners.model(0)


@pytest.mark.parametrize("options", [{}, {"capture": True}, {"checkpoint": True}])
def test_a_parameter_frozen_after_construction(net, draw, options):
    meta, (support, query) = maml(net, **options), (draw(), draw())
    meta(support, query).backward()
    net.body.weight.requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    loss = query_losses(net, loss_fn, support, query, STEPS, LR).mean()
    found_loss, found = meta_gradients(meta, support, query, params=trained)
    assert abs(found_loss - loss) < 1e-12
    assert distance(found, gradients(loss, trained)) < 1e-9


def test_a_head_replaced_after_construction(net, draw):
    meta, (support, query) = maml(net, adapt_parameters=["head.*"]), (draw(), draw())
    net.head = nn.Linear(4, 2).double()
    loss = query_losses(net, loss_fn, support, query, STEPS, LR, names=["head.weight", "head.bias"]).mean()
    found_loss, found = meta_gradients(meta, support, query, params=list(net.parameters()))
    assert abs(found_loss - loss) < 1e-12
    assert distance(found, gradients(loss, net.parameters())) < 1e-9
    net.head = nn.Sequential(nn.Linear(4, 2)).double()
    with pytest.raises(
        ValueError, match=r"model: .* head.0.bias, head.0.weight, head.bias, head.weight came or went since"
    ):
        meta(support, query)


@pytest.mark.parametrize("options", [{}, {"capture": True}, {"adapt_parameters": "head.*"}])
def test_frozen_learners_adapt(net, draw, options):
    meta, support, (x, _) = maml(net, **options), draw(), draw()
    before = meta.adapt(support)(x)
    meta.requires_grad_(False)
    torch.testing.assert_close(meta.adapt(support)(x), before)
    with torch.no_grad():
        assert meta(support, support).isfinite()


@pytest.mark.parametrize("options", [{}, {"capture": True}])
def test_predicates_see_the_parameters_themselves(net, draw, options):
    head = {id(p) for p in net.head.parameters()}
    meta = maml(net, adapt_parameters=lambda _, p: id(p) in head, **options)
    support = draw()
    expected = meta.adapt(support).params
    assert list(expected) == ["head.weight", "head.bias"]
    found = copy.deepcopy(meta).adapt(support).params
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_learned_rates_are_for_the_parameters_that_were_there(net, draw):
    meta = metafast.MetaSGD(net, loss_fn, inner=SGD(lr=LR))
    net.body.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"adapt_parameters: .* learned rates for each; got others in body.weight"):
        meta(draw(), draw())


def test_every_pattern_matches_something(net):
    with pytest.raises(
        ValueError, match=r"adapt_parameters: expected to match a parameter of body.weight, .* got 'haed.\*'"
    ):
        maml(net, adapt_parameters=["body.*", "haed.*"])


def test_task_weights_get_no_gradient(net, draw):
    weights = torch.ones(TASKS, requires_grad=True)
    with pytest.raises(ValueError, match="task_weights: expected a tensor that requires no gradient"):
        maml(net)(draw(), draw(), task_weights=weights)


def test_mappings_that_are_no_dicts(net, draw):
    batch = collections.UserDict(x=draw()[0])
    with pytest.raises(TypeError, match=r"support: expected a dict of tensors, got UserDict; pass dict\(support\)"):
        maml(net)(batch, batch)


@pytest.mark.parametrize("kind", ["maml", "proto_maml"])
def test_captured_learners_share_the_model(net, draw, kind):
    x, y = draw()
    labels = torch.tensor([[0, 0, 1, 1]]).expand(TASKS, -1)
    if kind == "maml":
        meta, support = maml(net, adapt_parameters="head.*", capture=True), (x, y)
    else:
        meta = metafast.ProtoMAML(
            net,
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            ways=2,
            inner=SGD(lr=LR),
            adapt_parameters="head.*",
            capture=True,
        )
        support = x, labels
    learners = meta.adapt(support)
    with torch.no_grad():
        net.body.weight.add_(1.0)
    before = learners(x)
    with torch.no_grad():
        net.body.weight.zero_()
    assert not torch.equal(learners(x), before)


SMALL_GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 30, "n_positions": 16}


def hugging_face(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    metafast.integrations.huggingface.register()
    if name == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL_GPT2))
    elif name == "llama":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=30, **sizes))
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        config = transformers.T5Config(vocab_size=30, decoder_start_token_id=0, **sizes)
        model = transformers.T5ForConditionalGeneration(config)
    return model.double().eval()


@pytest.mark.parametrize("attention", ["metafast", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers")
def test_hugging_face_models_as_they_are(generator, name, attention):
    """Their outputs hold a cache by default; an output object comes back as one."""
    model = hugging_face(name)
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 30, (2, 2, 6), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    meta = metafast.MAML(model, lambda m, b: m(**b).loss, inner=SGD(lr=0.1), steps=1)
    meta(batch, batch).backward()
    learners = meta.adapt(batch)
    outputs = learners(**batch)
    assert type(outputs) is type(model(**{k: v[0] for k, v in batch.items()}))
    for task in range(2):
        expected = learners.model(task)(**{key: value[task] for key, value in batch.items()})
        torch.testing.assert_close(outputs.logits[task], expected.logits)
        torch.testing.assert_close(outputs.loss[task], expected.loss)
    with pytest.raises(TypeError, match=r"outputs: expected a pytree of tensors, got a \w*Cache with tensors in it"):
        learners(**batch, use_cache=True)
    cache = model(**{k: v[0] for k, v in batch.items()}, use_cache=True).past_key_values
    with pytest.raises(
        TypeError, match=r"past_key_values: expected tensors .* got a \w*Cache, which all tasks would write"
    ):
        learners(**batch, past_key_values=cache)
