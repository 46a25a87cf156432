"""ProtoNet and ProtoMAML against their equations, one task after another, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain_loop import distance, gradients, meta_gradients
from torch import nn
from torch.func import functional_call

import metafast
from metafast.checking import meta_gradient_error
from metafast.inner import SGD

TASKS, WAYS, LR = 3, 4, 0.02


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.second = nn.Linear(6, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def loss_fn(model, batch):
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["label"]), {"accuracy": (logits.argmax(-1) == batch["label"]).double().mean()}


@pytest.fixture
def net(generator):
    return Embedding().double()


@pytest.fixture
def batches(generator):
    def draw(shots):
        labels = torch.arange(WAYS).repeat(shots).expand(TASKS, -1).clone()
        x = torch.randn(TASKS, shots * WAYS, 3, generator=generator, dtype=torch.float64)
        return {"x": x + F.one_hot(labels, WAYS)[..., :3], "label": labels}

    return draw(2), draw(3)


def prototypes(embedded, labels):
    """Equation 1, class by class."""
    return torch.stack([embedded[labels == k].mean(0) for k in range(WAYS)])


def nearest_logits(net, support, query, index):
    """Equation 2, distance by distance."""
    means = prototypes(net(support["x"][index]), support["label"][index])
    return torch.stack([torch.stack([-(e - c).pow(2).sum() for c in means]) for e in net(query["x"][index])])


@pytest.mark.parametrize("task_batching", ["vmap", "loop"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_proto_net(net, batches, task_batching, chunk):
    support, query = batches
    logits = [nearest_logits(net, support, query, index) for index in range(TASKS)]
    loss = torch.stack([F.cross_entropy(z, query["label"][i]) for i, z in enumerate(logits)]).mean()
    meta = metafast.ProtoNet(net, loss_fn, ways=WAYS, task_batching=task_batching, tasks_per_chunk=chunk)
    found_loss, found = meta_gradients(meta, support, query)
    assert abs(found_loss - loss) < 1e-12
    assert distance(found, gradients(loss, net.parameters())) < 1e-9
    outputs = meta.adapt(support)(query["x"])
    torch.testing.assert_close(outputs, torch.stack(logits).detach())
    assert not outputs.requires_grad
    accuracy = (outputs.argmax(-1) == query["label"]).double().mean(1)
    torch.testing.assert_close(meta.outcome.metrics["accuracy"], accuracy)
    assert set(meta.state_dict()) == {f"model.{name}" for name in net.state_dict()}


def test_proto_net_never_chooses_a_class_without_examples(net, batches):
    support, query = batches
    support["label"][1] = support["label"][1].clamp(max=WAYS - 2)
    outputs = metafast.ProtoNet(net, loss_fn, ways=WAYS).adapt(support)(query["x"])
    assert (outputs[1, :, -1] == -torch.inf).all()
    assert torch.isfinite(outputs[0]).all()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("task_batching", ["vmap", "loop"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("names", [["first.*", "second.*"], ["second.*"]])
def test_proto_maml(net, batches, names, order, task_batching, checkpoint):
    """Equations 3 and 4, then MAML's loop, with the gradient of the start."""
    support, query = batches
    meta = metafast.ProtoMAML(
        net,
        lambda model, batch: loss_fn(model, batch)[0],
        ways=WAYS,
        inner=SGD(lr=LR, learn={"lr": "tensor_step"}),
        steps=3,
        order=order,
        adapt_parameters=names,
        task_batching=task_batching,
        checkpoint=checkpoint,
    )
    with torch.no_grad():
        meta.rates.lr += 0.01 * torch.rand_like(meta.rates.lr)
    adapted = [name for name, _ in net.named_parameters() if name.split(".")[0] + ".*" in names]
    losses, logits = [], []
    for index in range(TASKS):
        x, labels = support["x"][index], support["label"][index]
        means = prototypes(net(x), labels)
        # Views, so that the body's inner gradient does not go through the head's start.
        params = {name: p.view_as(p) for name, p in net.named_parameters()}
        params |= {"W": 2 * means, "b": -means.pow(2).sum(1)}

        def classify(params, x):
            body = {name: p for name, p in params.items() if name not in "Wb"}
            return functional_call(net, body, (x,)) @ params["W"].T + params["b"]

        moving = [*adapted, "W", "b"]
        for step in range(3):
            loss = F.cross_entropy(classify(params, x), labels)
            grads = torch.autograd.grad(loss, [params[n] for n in moving], create_graph=order == 2, retain_graph=True)
            for i, (name, grad) in enumerate(zip(moving, grads, strict=True)):
                params[name] = params[name] - meta.rates.lr[step, i] * grad
        logits.append(classify(params, query["x"][index]))
        losses.append(F.cross_entropy(logits[-1], query["label"][index]))
    loss = torch.stack(losses).mean()
    found_loss, found = meta_gradients(meta, support, query)
    assert abs(found_loss - loss) < 1e-12
    assert distance(found, gradients(loss, meta.parameters())) < 1e-9
    torch.testing.assert_close(meta.adapt(support)(query["x"]), torch.stack(logits).detach())


def test_proto_maml_before_the_first_step_is_a_proto_net(net, batches):
    """The linear head at its start gives the same probabilities: ‖f(x)‖² is the same for all classes."""
    support, query = batches
    maml = metafast.ProtoMAML(net, loss_fn, ways=WAYS, inner=SGD(lr=LR)).adapt(support, steps=0)
    proto = metafast.ProtoNet(net, loss_fn, ways=WAYS).adapt(support)
    torch.testing.assert_close(maml(query["x"]).softmax(-1), proto(query["x"]).softmax(-1))


def test_proto_maml_updates_running_statistics_at_every_call_of_the_model(batches):
    """The prototypes' calls, those of each step, and those of the query sets."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).double()
    support, query = (
        {"x": torch.randn(TASKS, 6, 4).double(), "label": labels} for labels in [torch.arange(3).repeat(TASKS, 2)] * 2
    )
    meta = metafast.ProtoMAML(net, loss_fn, ways=3, inner=SGD(lr=0.0), steps=2)
    norm = copy.deepcopy(net[1])
    for x in (*support["x"], *support["x"], *support["x"], *query["x"]):
        norm(net[0](x))
    meta(support, query).backward()
    torch.testing.assert_close(net[1].running_mean, norm.running_mean)
    torch.testing.assert_close(net[1].running_var, norm.running_var)


def test_batches_of_other_kinds(net, batches):
    expected = metafast.ProtoNet(net, loss_fn, ways=WAYS)(*batches)
    pairs = [(batch["x"], batch["label"]) for batch in batches]
    found = metafast.ProtoNet(net, lambda model, pair: F.cross_entropy(model(pair[0]), pair[1]), ways=WAYS)(*pairs)
    assert torch.equal(found, expected)
    named = [{"image": batch["x"], "class": batch["label"], "id": batch["label"]} for batch in batches]
    found = metafast.ProtoNet(
        net,
        lambda model, batch: F.cross_entropy(model(batch["image"]), batch["class"]),
        ways=WAYS,
        inputs=lambda batch: batch["image"],
        labels=lambda batch: batch["class"],
    )(*named)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.ones(2, 3, 3), TypeError, r"batch: expected a pair \(inputs, labels\) or a dict of both, .* got Tensor"),
        (
            {"x": torch.ones(2, 3), "y": torch.ones(2, 3)},
            ValueError,
            "batch: expected inputs and 'label' or 'labels', .* got 'x', 'y'",
        ),
    ],
)
def test_batches_that_do_not_say_what_is_what(net, batch, error, message):
    with pytest.raises(error, match=message):
        metafast.ProtoNet(net, loss_fn, ways=WAYS, task_batching="loop")(batch, batch)


def test_bad_arguments(net, batches):
    with pytest.raises(ValueError, match="ways: expected at least 1, got 0"):
        metafast.ProtoNet(net, loss_fn, ways=0)
    with pytest.raises(TypeError, match="ways: expected an int, got float"):
        metafast.ProtoMAML(net, loss_fn, ways=2.0, inner=SGD(lr=LR))
    with pytest.raises(ValueError, match="steps: ProtoNet takes none, expected None or 0, got 3"):
        metafast.ProtoNet(net, loss_fn, ways=WAYS).adapt(batches[0], steps=3)
    with pytest.raises(TypeError, match="support: ProtoNet takes no steps, expected one support set, got PerStep"):
        metafast.ProtoNet(net, loss_fn, ways=WAYS)(metafast.PerStep([batches[0]]), batches[1])
    with pytest.raises(ValueError, match="inner: ProtoMAML learns rates for tensors and steps"):
        metafast.ProtoMAML(net, loss_fn, ways=WAYS, inner=SGD(lr=LR, learn={"lr": "parameter"}))
    flat = nn.Sequential(net, nn.Flatten(0))
    with pytest.raises(ValueError, match=r"model: expected embeddings \[examples, size\], got shape \(40,\)"):
        metafast.ProtoNet(flat, loss_fn, ways=WAYS)(*batches)


@pytest.mark.parametrize(
    "meta",
    [
        lambda net: metafast.ProtoNet(net, loss_fn, ways=WAYS),
        lambda net: metafast.ProtoMAML(net, loss_fn, ways=WAYS, inner=SGD(lr=LR)),
    ],
)
def test_check_copies_the_model_into_the_classifier(net, batches, meta):
    learner = meta(net)
    report = metafast.check(learner, *batches, rounds=1)
    # The last bias moves prototypes and queries alike: its gradient is what is left where terms cancel.
    assert max(error for name, error in report.errors.items() if name != "model.second.bias") < 1e-12
    assert meta_gradient_error(learner, *batches) < 1e-12
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", ["ProtoNet", "ProtoMAML"])
def test_the_first_call_of_a_model_that_runs_as_a_loop(batches, kind):
    """Both functions of the model find that it does not run under vmap, the second when the first has a graph."""
    options = {} if kind == "ProtoNet" else {"inner": SGD(lr=LR)}
    found = []
    for batching in ("auto", "loop"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5)).double()
        learner = getattr(metafast, kind)(net, loss_fn, ways=WAYS, task_batching=batching, **options)
        found.append((*meta_gradients(learner, *batches)[1], *net.buffers()))
    for auto, loop in zip(*found, strict=True):
        torch.testing.assert_close(auto, loop)
