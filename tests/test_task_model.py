"""How tasks come to run one after another, and which errors a caller sees."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from plain_loop import gradients, meta_gradients, query_losses
from torch import nn
from torch.func import functional_call

import metafast
from metafast.inner import SGD
from metafast.program import NotRecordableError

TASKS, STEPS, RATE = 3, 2, 0.1


def loss_fn(model, batch):
    return model(batch).square().mean()


def learner(model, loss_fn=loss_fn, kind=metafast.MAML, **options):
    return kind(model.double(), loss_fn, inner=SGD(lr=RATE), **{"steps": STEPS, **options})


@pytest.fixture
def draw(generator):
    return lambda *shape: torch.randn(TASKS, *(shape or (5, 4)), generator=generator, dtype=torch.float64)


def compare(meta, support, query, plain=None):
    plain = plain or copy.deepcopy(meta.model)
    loss, found = meta_gradients(meta, support, query)
    expected = query_losses(plain, meta.loss_fn, support, query, STEPS, RATE).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, list(gradients(expected, plain.parameters())), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["batch", "batch, averaging all", "instance"])
@pytest.mark.parametrize("training", [True, False])
def test_float_buffers_where_a_captured_step_falls_back(draw, caplog, norm, training):
    layer = {
        "batch": nn.BatchNorm1d(5),
        "batch, averaging all": nn.BatchNorm1d(5, momentum=None),
        "instance": nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
    }[norm]
    net = nn.Sequential(nn.Conv1d(4, 5, 1), layer, nn.Tanh(), nn.Conv1d(5, 2, 1)).train(training)
    meta = learner(net, capture=True)
    plain = copy.deepcopy(net).double()
    for _ in range(3):
        compare(meta, draw(6, 4, 3), draw(5, 4, 3), plain)
    assert ("one after another" in caplog.text) == training


class Hooked(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.calls = []
        # Halves what arrives at the first layer.
        self[1].register_full_backward_hook(lambda module, grads, outputs: (self.calls.append(1), (grads[0] / 2,))[1])


@pytest.mark.parametrize("task_batching", ["auto", "loop"])
def test_backward_hooks_are_called(draw, caplog, task_batching):
    model = Hooked()
    meta = learner(model, order=1, task_batching=task_batching)
    plain = copy.deepcopy(model).double()
    support, query = draw(), draw()
    loss, found = meta_gradients(meta, support, query)
    expected = query_losses(plain, loss_fn, support, query, STEPS, RATE, create_graph=False).mean()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, list(gradients(expected, plain.parameters())))
    assert model.calls
    assert ("1 has backward hooks, which vmap would never call" in caplog.text) == (task_batching == "auto")


def test_backward_hooks_where_vmap_is_insisted_on(draw, caplog):
    meta = learner(Hooked(), task_batching="vmap")
    for _ in range(2):
        meta(draw(), draw())
    assert caplog.text.count("1 has backward hooks, which vmap would never call; 'auto' and 'loop' call them") == 1


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, NotImplementedError, TypeError])
def test_an_error_of_the_users_is_raised_as_it_is(draw, caplog, kind):
    """Even where it would not occur again in a loop."""
    raised = []

    def failing(model, batch):
        if not raised:
            raised.append(kind("the disk is full"))
            raise raised[0]
        return loss_fn(model, batch)

    meta = learner(nn.Linear(4, 4), failing)
    with pytest.raises(kind, match=r"^the disk is full$") as caught:
        meta(draw(), draw())
    assert caught.value is raised[0]
    assert not caplog.text
    meta(draw(), draw())
    assert "one after another" not in caplog.text


def test_an_error_of_torchs_is_that_of_one_task(draw, caplog):
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(5x4 and 3x2\)") as caught:
        learner(nn.Linear(3, 2))(draw(), draw())
    assert caught.value.__context__ is None
    assert not caplog.text


def test_memory_that_ran_out_is_no_reason_for_a_loop(draw):
    def failing(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        learner(nn.Linear(4, 4), failing)(draw(), draw())


def test_an_error_in_answer_to_vmaps_is_a_reason(draw, caplog):
    def looking(model, batch):
        try:
            batch.sum().item()
        except RuntimeError as error:
            raise ValueError("cannot look") from error
        return loss_fn(model, batch)

    compare(learner(nn.Linear(4, 4), looking), draw(), draw())
    assert "tasks run one after another, since the model does not run under vmap: cannot look" in caplog.text


@pytest.mark.parametrize("task_batching", ["auto", "loop"])
@pytest.mark.parametrize("order", [1, 2])
def test_embeddings_with_max_norm(generator, task_batching, order):
    """It writes to the weight before each look-up, without a gradient: to the model's own at the first step."""

    def ids():
        return torch.randint(9, (TASKS, 5), generator=generator)

    def embedded(model, batch):
        return model(batch).square().mean()

    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.7), nn.Linear(4, 3)).double()
    plain = copy.deepcopy(model)
    meta = learner(model, embedded, order=order, task_batching=task_batching)
    for _ in range(2):
        support, query = ids(), ids()
        with warnings.catch_warnings():
            # Torch says that it has no batching rule, and runs a loop of its own.
            warnings.simplefilter("ignore")
            loss, found = meta_gradients(meta, support, query)
        expected = query_losses(plain, embedded, support, query, STEPS, RATE, create_graph=order == 2).mean()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(found, list(gradients(expected, plain.parameters())))
        torch.testing.assert_close(model[0].weight, plain[0].weight)


@pytest.mark.parametrize("task_batching", ["auto", "loop"])
@pytest.mark.parametrize("middle", [lambda: nn.Linear(4, 4), lambda: nn.BatchNorm1d(4)], ids=["linear", "batch norm"])
@pytest.mark.parametrize("table", ["adapted", "shared", "frozen"])
def test_max_norm_of_a_tied_table(generator, table, middle, task_batching):
    """The output layer reads rows that the look-ups of the tasks before have shortened, and no others."""
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.7), middle(), nn.Linear(4, 9)).double()
    model[2].weight = model[0].weight
    model[0].weight.requires_grad_(table != "frozen")
    plain = copy.deepcopy(model)
    support, query = (torch.randint(9, (TASKS, 2), generator=generator) for _ in range(2))
    patterns = "1.*" if table == "shared" else None
    meta = learner(model, kind=metafast.Reptile, steps=1, task_batching=task_batching, adapt_parameters=patterns)
    names = list(meta.split_parameters().adapted)
    params = [plain.get_parameter(name) for name in names]
    grads = [torch.autograd.grad(loss_fn(plain, own), params) for own in support]
    losses = []
    for own, grad in zip(query, grads, strict=True):
        adapted = {n: p - RATE * g for n, p, g in zip(names, params, grad, strict=True)}
        losses.append(loss_fn(lambda x, own=adapted: functional_call(plain, own, (x,), tie_weights=True), own))
    torch.testing.assert_close(meta(support, query).detach(), torch.stack(losses).mean().detach())
    torch.testing.assert_close(model[0].weight, plain[0].weight)


def test_max_norm_of_a_table_that_all_tasks_adapt_under_vmap(generator):
    ids = torch.randint(9, (TASKS, 2), generator=generator)
    meta = learner(nn.Sequential(nn.Embedding(9, 4, max_norm=0.7), nn.Linear(4, 4)), task_batching="vmap")
    with pytest.raises(RuntimeError, match=r"max_norm lets each call write to the parameter 0\.weight; use"):
        meta(ids, ids)


@pytest.mark.parametrize("task_batching", ["auto", "loop"])
@pytest.mark.parametrize("others", [[nn.Linear(4, 3)], []], ids=["a layer", "alone"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_max_norm_is_not_recorded(generator, others, task_batching):
    ids = torch.randint(9, (TASKS, 5), generator=generator)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.7), *others)
    with pytest.raises(
        NotRecordableError, match=r"the forward writes to the parameter model.0.weight \(as an embedding with"
    ):
        learner(model, capture=True, task_batching=task_batching)(ids, ids)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", [metafast.MAML, metafast.ANIL, metafast.Reptile, metafast.IMAML])
def test_inside_of_inference_mode(draw, kind, captured):
    """As Lightning validates: with batches that were made in it, and before it."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    options = {"head": "2.*"} if kind is metafast.ANIL else {}
    meta = learner(net, kind=kind, capture=captured, **options)
    support, query = draw(), draw()
    with torch.no_grad():
        expected = meta(support, query)
        outputs = meta.adapt(support)(query)
    with torch.inference_mode():
        for batches in ((support, query), (support.clone(), query.clone())):
            torch.testing.assert_close(meta(*batches), expected)
            learners = meta.adapt(batches[0])
            torch.testing.assert_close(learners(batches[1]), outputs)
        module = learners.model(1)
    torch.testing.assert_close(learners(query), outputs)
    torch.testing.assert_close(module(query[1]), outputs[1])
    module(query[1]).sum().backward()
    # What was made in it serves for training, too.
    with torch.inference_mode():
        made = support.clone(), query.clone()
    found = meta_gradients(meta, *made)
    torch.testing.assert_close(found, meta_gradients(meta, support, query))


def test_metrics_that_are_no_tensors(draw):
    with pytest.raises(TypeError, match="loss_fn: expected metrics that are tensors, got float for 'accuracy'"):
        learner(nn.Linear(4, 4), lambda model, batch: (loss_fn(model, batch), {"accuracy": 0.5}))(draw(), draw())


class Several(nn.Module):
    """Outputs that are not all tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return {"logits": self.linear(x) * scale, "nothing": None, "name": "several", "count": x.shape[0]}


@pytest.mark.parametrize("task_batching", ["vmap", "loop"])
def test_outputs_that_are_not_all_tensors(draw, task_batching):
    meta = learner(Several(), lambda m, b: m(b)["logits"].square().mean(), task_batching=task_batching)
    learners = meta.adapt(draw())
    x = draw()
    found = learners(x, scale=2.0)
    assert {**found, "logits": None} == {"logits": None, "nothing": None, "name": "several", "count": 5}
    for task in range(TASKS):
        torch.testing.assert_close(found["logits"][task], learners.model(task)(x[task], scale=2.0)["logits"])


def test_outputs_of_other_shapes(draw):
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x[x[:, 0] > 0])

    meta = learner(Masked(4, 4), lambda model, batch: F.linear(batch, model.weight).square().mean())
    x = draw()
    x[:, :, 0] = 1.0
    x[1, :2, 0] = -1.0
    learners = meta.adapt(x)
    with pytest.raises(ValueError, match=r"outputs: expected the same shapes for every task, got \(3, 4\) for task 1"):
        learners(x)


@pytest.mark.parametrize("task_batching", ["auto", "loop"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_max_norm_in_rebuilt_steps(generator, task_batching):
    ids, query = (torch.randint(9, (TASKS, 5), generator=generator) for _ in range(2))
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.7), nn.Linear(4, 3))
    meta = learner(model, checkpoint=True, task_batching=task_batching)
    compare(meta, ids, query)


@pytest.mark.parametrize("table", ["adapted", "shared", "frozen"])
def test_max_norm_of_a_tied_table_in_rebuilt_steps(generator, table):
    """Rebuilt steps read the table as it was, before later look-ups shortened further rows."""
    ids, query = (torch.randint(9, (TASKS, 2), generator=generator) for _ in range(2))
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.7), nn.Linear(4, 4), nn.Linear(4, 9))
    model[2].weight = model[0].weight
    model[0].weight.requires_grad_(table != "frozen")
    patterns = "1.*" if table == "shared" else None
    rebuilt, kept = (
        meta_gradients(learner(copy.deepcopy(model), checkpoint=on, adapt_parameters=patterns), ids, query)
        for on in (True, False)
    )
    torch.testing.assert_close(rebuilt, kept)


class Strided(nn.Module):
    """Looks at its weight's memory from the beginning, after a buffer has counted the call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return x @ self.weight.as_strided((4, 2), (4, 1), 1)


def test_memory_of_its_own_leaves_buffers_as_a_plain_loop_does(draw):
    model = Strided()
    plain = copy.deepcopy(model).double()
    meta = learner(model, task_batching="loop")
    for _ in range(2):
        compare(meta, draw(), draw(), plain)
        assert model.calls == plain.calls


def test_a_recording_counts_every_call_once(draw):
    """Torch's shape functions look at memory the first time that an operation is recorded in a process."""
    torch._subclasses.fake_tensor.FakeTensorMode.cache_clear()
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    plain = copy.deepcopy(model).double()
    meta = learner(model, capture=True)
    compare(meta, draw(), draw(), plain)
    assert model[0].num_batches_tracked == TASKS * (STEPS + 1)


def test_learners_of_a_model_that_depends_on_its_calls(draw):
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).double()
    learners = learner(model).adapt(draw())
    x, plain = draw(), copy.deepcopy(model)
    with torch.no_grad():
        expected = [
            torch.func.functional_call(plain, {k: p[t] for k, p in learners.params.items()}, (x[t],))
            for t in range(TASKS)
        ]
    torch.testing.assert_close(learners(x), torch.stack(expected))


FIRST = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: nn.LayerNorm(4),
    "without bias": lambda: nn.BatchNorm1d(4, affine=False),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 1), nn.Flatten(1)),
    "frozen": lambda: nn.BatchNorm1d(4).requires_grad_(False),
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FIRST)
def test_captured_first_layers_whose_inputs_need_no_gradient(draw, name, training, order):
    """Their backward passes leave a result out."""
    model = nn.Sequential(FIRST[name](), nn.Tanh(), nn.Linear(4, 2)).double().train(training)
    plain = copy.deepcopy(model)
    meta = learner(model, capture=True, order=order)
    for _ in range(2):
        support, query = draw(), draw()
        loss, found = meta_gradients(meta, support, query, params=[p for p in model.parameters() if p.requires_grad])
        expected = query_losses(plain, loss_fn, support, query, STEPS, RATE, create_graph=order == 2).mean()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        trained = [p for p in plain.parameters() if p.requires_grad]
        torch.testing.assert_close(found, list(gradients(expected, trained)), rtol=1e-9, atol=1e-11)
