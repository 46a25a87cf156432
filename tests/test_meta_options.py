"""Options of the inner loop and of the tasks' losses, each against the plain loop in float64."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from plain_loop import adaptation, distance, gradients, meta_gradients, query_losses, task
from some_cases import half
from torch import nn
from torch.utils.checkpoint import checkpoint as model_checkpoint

import metafast
from metafast.inner import SGD

TASKS, STEPS, LR = 5, 3, 0.1


def mlp():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.fixture
def net(generator):
    return mlp()


@pytest.fixture
def draw(generator):
    def draw(shots, tasks=TASKS):
        return tuple(torch.randn(tasks, shots, size, generator=generator, dtype=torch.float64) for size in (3, 2))

    return draw


def maml(net, loss_fn=loss_fn, **options):
    return metafast.MAML(net, loss_fn, **{"inner": SGD(lr=LR), "steps": STEPS, **options})


# --- Support batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_fresh_support_batch_a_step(net, draw, checkpoint):
    support, query = [draw(4), draw(5), draw(4)], draw(5)
    loss = query_losses(net, loss_fn, support, query, STEPS, LR).mean()
    meta = maml(net, checkpoint=checkpoint)
    found_loss, found = meta_gradients(meta, metafast.PerStep(support), query)
    assert abs(found_loss - loss) < 1e-12
    assert distance(found, gradients(loss, net.parameters())) < 1e-9
    learners = meta.adapt(metafast.PerStep(support), steps=2)
    expected = adaptation(net, loss_fn, [task(batch, 1) for batch in support], 2, LR)[-1]
    torch.testing.assert_close(learners.params["0.weight"][1], expected["0.weight"].detach(), rtol=1e-12, atol=1e-14)


def test_per_step_needs_a_batch_for_every_step(net, draw):
    support, query = metafast.PerStep([draw(4), draw(4)]), draw(5)
    with pytest.raises(ValueError, match="support: expected PerStep of at least 3 batches, got 2"):
        maml(net)(support, query)
    with pytest.raises(ValueError, match="support: expected PerStep of at least 4 batches, got 2"):
        maml(net).adapt(support, steps=4)
    with pytest.raises(ValueError, match="batches: expected one per step, got none"):
        metafast.PerStep([])


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("parts", [2, 3, 9])
def test_micro_batches_are_the_whole_batch(net, draw, parts, order, checkpoint):
    support, query = draw(7), draw(5)  # 7 examples: parts of different sizes
    loss = query_losses(net, loss_fn, support, query, STEPS, LR, create_graph=order == 2).mean()
    meta = maml(net, micro_batches=parts, order=order, checkpoint=checkpoint)
    found_loss, found = meta_gradients(meta, support, query)
    assert abs(found_loss - loss) < 1e-12
    assert distance(found, gradients(loss, net.parameters())) < 1e-9
    torch.testing.assert_close(meta.outcome.support_losses, maml_losses(net, support, query))


def maml_losses(net, support, query):
    meta = maml(net)
    meta(support, query)
    return meta.outcome.support_losses


def test_micro_batches_of_what_has_no_examples(net, draw):
    support, query = draw(4), draw(5)
    with pytest.raises(
        ValueError, match=r"support: micro_batches cuts the second dimension .* got shapes \(5, 4, 3\), \(5,\)"
    ):
        maml(net, micro_batches=2)((support[0], support[1][:, 0, 0]), query)


# --- Losses of tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_multi_step_loss(net, draw, order, checkpoint):
    support, query = draw(4), draw(5)
    weights = [0.5, 0.0, 2.0]
    loss = query_losses(net, loss_fn, support, query, STEPS, LR, step_weights=weights, create_graph=order == 2).mean()
    found_loss, found = meta_gradients(
        maml(net, step_weights=weights, order=order, checkpoint=checkpoint), support, query
    )
    assert abs(found_loss - loss) < 1e-12
    assert distance(found, gradients(loss, net.parameters())) < 1e-9


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 7])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "global_mean"])
def test_reductions_weights_and_chunks(net, draw, generator, reduction, weighted, chunk):
    support, query = draw(4), draw(5)
    weights = torch.rand(TASKS, generator=generator) if weighted else None
    losses = query_losses(net, loss_fn, support, query, STEPS, LR)
    used = torch.ones(TASKS).double() if weights is None else weights.double()
    loss = (used * losses).sum() / (1 if reduction == "sum" else used.sum())
    meta = maml(net, reduction=reduction, tasks_per_chunk=chunk)
    found_loss, found = meta_gradients(meta, support, query, task_weights=weights)
    assert abs(found_loss - loss) < 1e-12
    assert distance(found, gradients(loss, net.parameters())) < 1e-9
    torch.testing.assert_close(meta.outcome.query_losses, losses.detach())
    assert meta.outcome.support_losses.shape == (STEPS, TASKS)


@pytest.mark.parametrize("chunk", [None, 2])
def test_reptile_with_weights_and_adam_outside(net, draw, generator, chunk):
    """The gradient that Adam sees is θ − Σ w_i θ_i' / Σ w_i: its step is that of Adam on this gradient."""
    support, weights = draw(4), torch.rand(TASKS, generator=generator).double()
    adapted = [adaptation(net, loss_fn, task(support, i), STEPS, LR, create_graph=False)[-1] for i in range(TASKS)]
    twin = copy.deepcopy(net)
    for name, p in twin.named_parameters():
        mean = sum(w * a[name].detach() for w, a in zip(weights, adapted, strict=True)) / weights.sum()
        p.grad = p.detach() - mean
    torch.optim.Adam(twin.parameters(), 0.01).step()
    meta = metafast.Reptile(net, loss_fn, inner=SGD(lr=LR), steps=STEPS, tasks_per_chunk=chunk)
    meta(support, task_weights=weights).backward()
    torch.optim.Adam(net.parameters(), 0.01).step()
    for p, expected in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"checkpoint": True}, {"tasks_per_chunk": 1}], ids=str)
def test_tensors_that_would_get_no_gradient_are_refused(net, draw, options):
    temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def loss(model, batch):
        return loss_fn(model, batch) * temperature

    with pytest.raises(RuntimeError, match=f"{next(iter(options))}.*no parameter that the learner was made with"):
        maml(net, loss, **options)(draw(4), draw(5)).backward()
    temperature.requires_grad_(False)
    maml(net, loss, **options)(draw(4), draw(5)).backward()


@pytest.mark.parametrize("options", [{"checkpoint": True}, {"tasks_per_chunk": 1}], ids=str)
def test_what_the_loss_makes_itself_may_require_a_gradient(net, draw, options):
    def loss(model, batch):
        inputs = batch[0].detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        return loss_fn(model, batch) + slope.pow(2).mean()

    support, query = draw(4), draw(5)
    results = [meta_gradients(maml(net, loss, task_batching="loop", **o), support, query)[1] for o in ({}, options)]
    assert distance(*results) < 1e-12


def test_chunks_leave_no_graph_behind(net, draw):
    """When the call returns, gradients are computed: between the loss and the parameters there is one node."""
    loss = maml(net, tasks_per_chunk=2)(draw(4), draw(5))
    (node,) = [node for node, _ in loss.grad_fn.next_functions if node is not None]  # beneath the division
    assert type(node).__name__ == "_PrecomputedGradientsBackward"
    beneath = [type(node).__name__ for node, _ in node.next_functions if node is not None]
    assert beneath == ["AccumulateGrad"] * 4


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0] * TASKS, TypeError, r"task_weights: expected a tensor \[5\], got list"),
        (torch.ones(2), ValueError, r"task_weights: expected shape \(5,\), one per task, got \(2,\)"),
        (-torch.ones(TASKS), ValueError, "task_weights: expected at least 0 and a sum above 0"),
        (torch.zeros(TASKS), ValueError, "task_weights: expected at least 0 and a sum above 0"),
    ],
)
def test_bad_task_weights(net, draw, weights, error, message):
    with pytest.raises(error, match=message):
        maml(net)(draw(4), draw(5), task_weights=weights)


# --- Gradients that the call has computed ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"tasks_per_chunk": 2}, {"tasks_per_chunk": TASKS}, {"capture": True}], ids=str)
def test_backward_passes_of_one_call(net, draw, options):
    """Scaled, accumulated, and repeated where the graph is kept."""
    batches, params = (draw(4), draw(5)), list(net.parameters())
    expected = meta_gradients(maml(net, tasks_per_chunk=None), *batches)[1]
    loss = maml(net, **options)(*batches)
    for factor in (1.0, -3.0):
        found = torch.autograd.grad(factor * loss, params, retain_graph=True)
        assert distance(found, [factor * g for g in expected]) < 1e-10
    net.zero_grad()
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    assert distance([p.grad for p in params], [3 * g for g in expected]) < 1e-10


def test_a_chunks_gradient_becomes_that_of_the_parameters(net, draw):
    loss = maml(net, tasks_per_chunk=2)(draw(4), draw(5))
    gradients = loss.grad_fn.next_functions[0][0].gradients
    memory = {g.data_ptr() for g in gradients}
    del gradients
    loss.backward()
    assert {p.grad.data_ptr() for p in net.parameters()} == memory
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


# --- Losses that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("where", ["support", "query"])
def test_skipping_leaves_the_others_update_intact(net, draw, caplog, where, checkpoint, chunk):
    support, query = draw(4), draw(5)
    good = torch.tensor([0, 1, 3, 4])
    expected_loss = query_losses(net, loss_fn, *((tuple(x[good] for x in b)) for b in (support, query)), STEPS, LR)
    expected = gradients(expected_loss.mean(), net.parameters())
    (support if where == "support" else query)[0][2, 0, 0] = torch.nan
    meta = maml(net, on_nonfinite="skip", checkpoint=checkpoint, tasks_per_chunk=chunk)
    with caplog.at_level(logging.WARNING, "metafast"):
        loss, found = meta_gradients(meta, support, query)
    step = "at inner step 0" if where == "support" else "after the last inner step"
    assert f"{where} loss: expected finite values, got nan in task 2 {step}" in caplog.text
    assert abs(loss - expected_loss.mean()) < 1e-12
    assert distance(found, expected) < 1e-9
    assert meta.outcome.skipped == (2,)
    assert torch.isfinite(meta.outcome.query_losses).tolist() == [True, True, False, True, True]


def test_no_task_left(net, draw):
    support, query = draw(4), draw(5)
    query[0][:] = torch.inf
    loss, found = meta_gradients(maml(net, on_nonfinite="skip"), support, query)
    assert loss == 0
    assert all((g == 0).all() for g in found)


@pytest.mark.parametrize("step", [0, 2])
def test_task_and_step_are_named(net, draw, step):
    support, query = [draw(4) for _ in range(STEPS)], draw(5)
    support[step][0][3, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=rf"support loss: .* got nan in task 3 at inner step {step}"):
        maml(net)(metafast.PerStep(support), query)


# --- Buffers, dropout, autocast, checkpointing inside the model ------------------------------------------------------


def normed():
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()


@pytest.mark.parametrize("task_batching", ["auto", "loop"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_buffers_are_updated_once(generator, draw, checkpoint, task_batching):
    """As the plain loop updates them that keeps its graphs: once for each forward, in whatever order of tasks."""
    support, query = draw(6, tasks=1), draw(5, tasks=1)
    net = normed()
    twin = copy.deepcopy(net)
    loss = query_losses(twin, loss_fn, support, query, STEPS, LR).mean()
    expected = gradients(loss, twin.parameters())
    _, found = meta_gradients(maml(net, checkpoint=checkpoint, task_batching=task_batching), support, query)
    assert distance(found, expected) < 1e-9
    assert net[1].num_batches_tracked == STEPS + 1
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))


def test_adapt_leaves_buffers_alone(generator, draw):
    net = normed()
    before = copy.deepcopy(dict(net.named_buffers()))
    maml(net).adapt(draw(4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_skipped_tasks_leave_no_trace_in_buffers(generator, draw):
    net, support, query = normed(), draw(6), draw(5)
    twin = copy.deepcopy(net)
    good = torch.tensor([0, 1, 3, 4])
    maml(twin)(tuple(x[good] for x in support), tuple(x[good] for x in query))
    support[0][2] = torch.nan
    maml(net, on_nonfinite="skip")(support, query)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))


@pytest.mark.parametrize("options", [{"micro_batches": 2}, {"step_weights": [1.0, 1.0, 1.0]}])
@pytest.mark.parametrize("task_batching", ["vmap", "loop"])
def test_dropout_is_replayed_in_every_part(draw, task_batching, options):
    """Kept graphs draw once; rebuilt ones must have drawn the same, with parts of steps and losses between them too."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 2)).double()
    support, query = draw(6), draw(5)
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        results.append(
            meta_gradients(maml(net, checkpoint=checkpoint, task_batching=task_batching, **options), support, query)
        )
    assert results[0][0] == results[1][0]
    assert distance(results[1][1], results[0][1]) < 1e-12


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("task_batching", ["vmap", "loop"])
def test_autocast_outside(draw, task_batching, checkpoint):
    """Backward runs outside of the context, as torch advises: what is rebuilt there is in bf16 again."""
    net = mlp().float()
    support, query = (tuple(x.float() for x in batch) for batch in (draw(4), draw(5)))
    # Without the cache of casts, in which gradients of several tasks would be added up in bf16.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        their_loss = query_losses(net, loss_fn, support, query, STEPS, LR).mean()
        with metafast.accelerate(net):
            expected_loss = query_losses(net, loss_fn, support, query, STEPS, LR).mean()
    theirs, expected = (gradients(loss, net.parameters()) for loss in (their_loss, expected_loss))
    meta = maml(net, task_batching=task_batching, checkpoint=checkpoint)
    seen = []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = meta(support, query)
    loss.backward()
    found = [p.grad for p in net.parameters()]
    assert set(seen) == {torch.bfloat16}
    assert all(g.dtype == torch.float32 for g in found)
    exact = gradients(query_losses(net, loss_fn, support, query, STEPS, LR).mean(), net.parameters())
    assert distance(found, exact) <= 2 * distance(theirs, exact)
    if task_batching == "loop":
        assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("checkpoint", [False, True])
def test_autocast_inside(draw, checkpoint):
    net = mlp().float()

    def loss_in_bf16(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(batch[0])
        assert outputs.dtype == torch.bfloat16
        return F.mse_loss(outputs.float(), batch[1])

    support, query = (tuple(x.float() for x in batch) for batch in (draw(4), draw(5)))
    with metafast.accelerate(net):
        expected = gradients(query_losses(net, loss_in_bf16, support, query, STEPS, LR).mean(), net.parameters())
    meta = maml(net, loss_in_bf16, task_batching="loop", checkpoint=checkpoint)
    _, found = meta_gradients(meta, support, query)
    assert distance(found, expected) < 1e-6


class Checkpointing(nn.Module):
    """Recomputes its middle in the backward pass, through a name bound before any learner exists."""

    def __init__(self, enabled):
        super().__init__()
        self.enabled = enabled
        self.first = nn.Linear(3, 6)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3), nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.last = nn.Linear(6, 2)
        self.checkpoint = model_checkpoint

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        hidden = self.checkpoint(self.middle, hidden, use_reentrant=False) if self.enabled else self.middle(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("task_batching", ["auto", "loop"])
def test_torch_checkpoint_inside_the_model(draw, caplog, task_batching, checkpoint):
    support, query = draw(6), draw(5)
    plain = Checkpointing(enabled=False).double()
    recomputing = Checkpointing(enabled=True).double()
    recomputing.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    _, expected = meta_gradients(maml(plain, task_batching="loop"), support, query)
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING, "metafast"):
        _, found = meta_gradients(maml(recomputing, task_batching=task_batching, checkpoint=checkpoint), support, query)
    assert distance(found, expected) < 1e-9
    for name, buffer in recomputing.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name))
    assert ("torch.utils.checkpoint inside the model does not run under vmap" in caplog.text) == (
        task_batching == "auto"
    )
    with torch.no_grad():
        plain.eval(), recomputing.eval()
        expected = maml(plain).adapt(support)(query[0])
        torch.testing.assert_close(maml(recomputing).adapt(support)(query[0]), expected)


# --- It lasts -------------------------------------------------------------------------------------------------------


def test_evaluation_builds_no_graph(net, draw):
    support, query = draw(4), draw(5)
    with torch.no_grad():
        loss = maml(net)(support, query)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, query_losses(net, loss_fn, support, query, STEPS, LR).mean().detach())
    assert all(p.grad is None for p in net.parameters())
    assert not any(p.requires_grad for p in maml(net).adapt(support).params.values())


@pytest.mark.parametrize("checkpoint", half([False, True]))
def test_500_meta_steps_keep_nothing(net, draw, checkpoint):
    meta = maml(net, checkpoint=checkpoint, inner=SGD(lr=LR, learn={"lr": "tensor_step"}))
    optimizer = torch.optim.Adam(meta.parameters(), 1e-3)
    support, query = draw(3, tasks=2), draw(3, tasks=2)

    def tensors_after(count):
        for _ in range(count):
            optimizer.zero_grad()
            meta(support, query).backward()
            optimizer.step()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.disable()  # what only the collector would free counts as growth
    try:
        first = tensors_after(10)
        assert tensors_after(490) <= first
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoint": "yes"}, ValueError, "checkpoint: expected True, False or 'auto', got 'yes'"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite: expected 'raise' or 'skip', got 'ignore'"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of 'mean', 'sum', 'global_mean', got 'max'"),
        ({"micro_batches": 0}, ValueError, "micro_batches: expected at least 1, got 0"),
        ({"tasks_per_chunk": 0}, ValueError, "tasks_per_chunk: expected at least 1, got 0"),
        ({"tasks_per_chunk": 1.5}, TypeError, "tasks_per_chunk: expected an int, got float"),
        ({"memory_budget": 0}, ValueError, "memory_budget: expected bytes as an int, .* got 0"),
        (
            {"memory_budget": 1.5},
            ValueError,
            "memory_budget: .* a fraction of the free memory as a float of at most 1, .* got 1.5",
        ),
        ({"memory_budget": "half"}, TypeError, "memory_budget: .* or None, got str"),
    ],
)
def test_bad_options(net, options, error, message):
    with pytest.raises(error, match=message):
        maml(net, **options)
