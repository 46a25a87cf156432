"""Learners of models that ``fully_shard`` has sharded over two gloo processes, against one process with all tasks."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from plain_loop import distance
from some_cases import third
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from two_processes import on_two_processes, part

import metafast
from metafast.engine import sharded_parameters
from metafast.inner import SGD, Adam

RULE = SGD(lr=0.1)
LAYERS = 3
TASKS = 4


class Classifier(nn.Module):
    """Odd sizes: shards are uneven."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def loss_fn(model, batch):
    logits = model(batch[0])
    # Metrics without memory of their own: of a parameter that may be sharded, under any name.
    bias = next(p for name, p in model.named_parameters() if name.endswith("head.bias"))
    return F.cross_entropy(logits, batch[1]), {"bias": bias.detach(), "logits": logits}


def classifier(freeze=False):
    torch.manual_seed(0)
    model = Classifier().double()
    if freeze:
        model.embedding.requires_grad_(False)
        model.layers.requires_grad_(False)
    return model


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(11, (TASKS, shots, 5), generator=generator), torch.arange(shots).expand(TASKS, shots) % 3)
        for shots in (4, 6)
    ]


def mine(rank):
    return part(batches(), slice(2 * rank, 2 * rank + 2))


def shard_layers(model, **options):
    for layer in model.layers:
        fully_shard(layer, **options)
    return model


def shard_all(model):
    shard_layers(model)
    fully_shard(model)
    return model


def shard_groups(model):
    fully_shard([model.layers[0], model.layers[1]])
    fully_shard([model.embedding, model.head])
    return model


def shard_and_replicate(model):
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    return shard_layers(model, mesh=mesh)


def keep_gathered(model):
    return shard_layers(model, reshard_after_forward=False)


def maml(model, **options):
    return metafast.MAML(model, loss_fn, **{"inner": RULE, "steps": 2, **options})


def head(model, **options):
    return maml(model, adapt_parameters="head.*", **options)


# Are layers and embedding frozen; what is sharded; the learner.
CASES = {
    "frozen layers, head adapted": (True, shard_layers, head),
    "frozen layers, head adapted and sharded": (True, shard_all, head),
    "shared layers": (False, shard_layers, head),
    "shared layers, rebuilt graphs": (False, shard_layers, lambda model: head(model, checkpoint=True)),
    "shared layers, kept gathered": (False, keep_gathered, head),
    "shared layers, replicas": (False, shard_and_replicate, head),
    "groups": (False, shard_groups, head),
    "part of a layer adapted": (False, shard_all, lambda model: maml(model, adapt_parameters="*norm*")),
    "all adapted": (False, shard_all, lambda model: maml(model, inner=Adam(lr=0.01), reduction="global_mean")),
    "all adapted, in a loop": (False, shard_all, lambda model: maml(model, task_batching="loop")),
    "all adapted, in chunks": (False, shard_all, lambda model: maml(model, tasks_per_chunk=1, micro_batches=2)),
    "first order": (False, shard_all, lambda model: maml(model, order=1)),
    "rates of each parameter": (
        False,
        shard_all,
        lambda model: metafast.MetaSGD(model, loss_fn, inner=RULE, adapt_parameters="head.*"),
    ),
    "Reptile": (False, shard_all, lambda model: metafast.Reptile(model, loss_fn, inner=RULE, steps=2)),
    "iMAML": (
        False,
        shard_all,
        lambda model: metafast.IMAML(model, loss_fn, inner=RULE, steps=2, adapt_parameters="head.*"),
    ),
    "ProtoNet": (False, shard_all, lambda model: metafast.ProtoNet(model, loss_fn, ways=3)),
    "Proto-MAML": (False, shard_all, lambda model: metafast.ProtoMAML(model, loss_fn, ways=3, inner=RULE, steps=2)),
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def results(meta, support, query, mean):
    """The loss, the gradients, metrics and outputs of the adapted models."""
    for _ in range(2):  # a second step: nothing is left over from the first
        meta.zero_grad()
        loss = meta(support, query)
        loss.backward()
    for p in meta.parameters():
        if p.grad is not None:
            assert isinstance(p.grad, DTensor) == isinstance(p, DTensor)
    learners = meta.adapt(support)
    return {
        "loss": mean(loss.detach()),
        "gradients": {name: whole(p.grad) for name, p in meta.named_parameters() if p.grad is not None},
        "metrics": {name: metric.detach() for name, metric in meta.outcome.metrics.items()},
        "outputs": learners(query[0]).detach(),
        "params": {name: value.clone() for name, value in learners.params.items()},
    }


def mean_over_ranks(loss):
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def results_of_a_rank(rank, cases):
    logging.getLogger("metafast").addHandler(log := _Messages())
    found = {}
    for case in cases:
        freeze, shard, learner = CASES[case]
        found[case] = results(learner(shard(classifier(freeze))), *mine(rank), mean_over_ranks)
    return {"cases": found, "log": log.messages}


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def test_the_gradient_is_that_of_one_process(tmp_path):
    cases = third(CASES)
    ranks = on_two_processes(tmp_path, results_of_a_rank, cases, seconds=300)
    for rank, found in enumerate(ranks):
        assert not isinstance(found, str), found
        assert found["log"] == []  # no learner has left vmap
        for case in cases:
            freeze, _, learner = CASES[case]
            actual = found["cases"][case]
            expected = results(learner(classifier(freeze)), *batches(), lambda loss: loss)
            torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-12, atol=0, msg=case)
            assert actual["gradients"].keys() == expected["gradients"].keys(), case
            for name, gradient in expected["gradients"].items():
                # Adapted keys have a bias without influence.
                torch.testing.assert_close(
                    actual["gradients"][name], gradient, rtol=1e-9, atol=1e-15, msg=f"{case}: {name}"
                )
            tasks = slice(2 * rank, 2 * rank + 2)
            for kind in ("metrics", "params"):
                for name, value in expected[kind].items():
                    torch.testing.assert_close(actual[kind][name], value[tasks], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(actual["outputs"], expected["outputs"][tasks], rtol=1e-9, atol=1e-12)


def gathered_units(rank):
    """The most units that were whole at once, and the memory that is left, of a call with each of two policies."""
    units = []
    gather = sharded_parameters._Unit.gather

    def counting(unit):
        gather(unit)
        units.append(unit)
        whole_now.append(sum(other.is_whole for other in set(units)))

    sharded_parameters._Unit.gather = counting
    found = {}
    for name, options in {"freed": {}, "kept": {"reshard_after_forward": False}}.items():
        whole_now = []
        units.clear()
        model = shard_layers(classifier(), **options)
        before = list(model.layers[0]._forward_pre_hooks), list(model.layers[0]._forward_hooks)
        meta = head(model)
        meta(*mine(rank)).backward()
        left = sum(p.untyped_storage().nbytes() for unit in set(units) for p in unit.wholes)
        after = list(model.layers[0]._forward_pre_hooks), list(model.layers[0]._forward_hooks)
        found[name] = {"calls": len(units), "most": max(whole_now), "left": left, "same hooks": before == after}
    return found


def test_one_layer_is_gathered_at_a_time(tmp_path):
    for found in on_two_processes(tmp_path, gathered_units):
        assert not isinstance(found, str), found
        assert found["freed"]["most"] == 1
        assert found["freed"]["calls"] > LAYERS
        assert found["kept"] | {"left": 0} == {"calls": LAYERS, "most": LAYERS, "left": 0, "same hooks": True}
        for policy in found.values():
            assert policy["left"] == 0
            assert policy["same hooks"]


def trained(meta, support, query, steps, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(meta.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        meta(support, query).backward()
        optimizer.step()
    return optimizer


def learner_of_rates(model):
    return head(model, inner=SGD(lr=0.1, learn="lr"))


def saved(meta, optimizer, folder):
    model_state, optimizer_state = get_state_dict(meta, optimizer)
    dcp.save({"meta": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def resumed(meta, folder):
    optimizer = torch.optim.Adam(meta.parameters(), 1e-2)
    model_state, optimizer_state = get_state_dict(meta, optimizer)
    state = {"meta": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(meta, optimizer, model_state_dict=state["meta"], optim_state_dict=state["optimizer"])
    return optimizer


def parameters(meta):
    return [whole(p.detach()).clone() for p in meta.parameters()]


def train_and_resume_on_a_rank(rank, folder):
    meta = learner_of_rates(shard_all(classifier()))
    optimizer = trained(meta, *mine(rank), 2)
    saved(meta, optimizer, folder / "of two")
    trained(meta, *mine(rank), 1, optimizer)
    other = learner_of_rates(shard_layers(classifier()))
    trained(other, *mine(rank), 1, resumed(other, folder / "of one"))
    # As much memory as the model has, in two.
    local = sum(p.to_local().numel() for p in meta.model.parameters())
    return {"straight": parameters(meta), "resumed": parameters(other), "local": local}


# Torch says that it saves and loads for one process.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_training_goes_on_on_another_number_of_processes(tmp_path):
    meta = learner_of_rates(classifier())
    optimizer = trained(meta, *batches(), 2)
    saved(meta, optimizer, tmp_path / "of one")
    trained(meta, *batches(), 1, optimizer)
    expected = parameters(meta)
    ranks = on_two_processes(tmp_path, train_and_resume_on_a_rank, tmp_path)
    for found in ranks:
        assert not isinstance(found, str), found
        assert distance(found["straight"], expected) < 1e-9
        assert distance(found["resumed"], expected) < 1e-9
    total = sum(p.numel() for p in meta.model.parameters())
    assert sum(found["local"] for found in ranks) == total
    other = learner_of_rates(classifier())
    trained(other, *batches(), 1, resumed(other, tmp_path / "of two"))
    assert distance(parameters(other), expected) < 1e-9


def attempts(rank):
    """Calls that are refused or unusual: their errors, or what they give."""
    found = {}

    def attempt(name, call):
        try:
            found[name] = call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()

    support, query = mine(rank)
    sharded = shard_layers(classifier())
    attempt("capture", lambda: head(sharded, capture=True)(support, query))
    attempt("skip", lambda: head(sharded, on_nonfinite="skip").adapt(support))
    attempt("numbers of tasks", lambda: head(sharded)(*part(batches(), slice(0, 3 - rank))))
    attempt("batches", lambda: head(sharded)(support if rank else [], query))
    attempt("check", lambda: metafast.check(head(sharded), support, query))
    attempt("model", lambda: head(sharded).adapt(support).model(0))

    def other_seeds():
        torch.manual_seed(rank)
        return head(shard_layers(Classifier()))(support, query)

    attempt("seeds", other_seeds)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    attempt("policy", lambda: head(shard_layers(classifier(), mp_policy=policy))(support, query))

    def max_norm():
        model = classifier()
        model.embedding.max_norm = 0.1
        return head(shard_all(model))(support, query)

    attempt("max_norm", max_norm)

    def half_of_the_ranks():
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
        return head(shard_layers(classifier(), mesh=mesh))(support, query)

    attempt("mesh", half_of_the_ranks)

    def other_tensors():
        model = shard_layers(classifier())
        model.head.weight = nn.Parameter(
            distribute_tensor(model.head.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
        )
        return head(model)(support, query)

    attempt("tensors", other_tensors)

    def flat():
        model = classifier()
        model.head = nn.Module.__new__(FullyShardedDataParallel)
        nn.Module.__init__(model.head)
        return maml(model)(support, query)

    attempt("flat", flat)
    attempt("data parallel", lambda: DistributedDataParallel(head(sharded)))

    def bad_task():
        def weighted(model, batch):
            return loss_fn(model, batch)[0] * batch[2].mean()

        meta = metafast.MAML(shard_all(classifier()), weighted, inner=RULE)
        weights = torch.ones(2, 4, dtype=torch.float64)
        if rank == 1:
            weights[0] = torch.nan
        return meta((*support, weights), (*query, torch.ones(2, 6, dtype=torch.float64)))

    attempt("bad task", bad_task)

    def offloaded():
        model = shard_layers(classifier(), offload_policy=CPUOffloadPolicy(pin_memory=False))
        return head(model)(support, query).item()

    attempt("offloaded", offloaded)

    def between_ordinary_calls():
        """The model's own forward and backward before a call, and FSDP's hooks after it."""
        meta = head(shard_all(classifier()))
        meta.model(query[0][0])
        meta(support, query).backward()
        first = [whole(p.grad) for p in meta.parameters()]
        meta.zero_grad()
        F.cross_entropy(meta.model(query[0][0]), query[1][0]).backward()
        meta.zero_grad()
        meta(support, query).backward()
        return distance([whole(p.grad) for p in meta.parameters()], first)

    attempt("between", between_ordinary_calls)

    def around_the_learner():
        meta = head(shard_layers(classifier()))
        fully_shard(meta)
        for _ in range(2):
            meta.zero_grad()
            meta(support, query).backward()
        learners = meta.adapt(support)
        return [whole(p.grad) for p in meta.parameters()], learners(query[0])

    attempt("around", around_the_learner)

    def without_gradients():
        meta = head(shard_all(classifier()))
        with torch.no_grad():
            loss = meta(support, query)
        with torch.inference_mode():
            unadapted = meta.adapt(support, steps=0)
            outputs = unadapted(query[0])
        return [loss, meta(support, query).detach(), unadapted.params["head.weight"][0].clone(), outputs.clone()]

    attempt("without", without_gradients)

    def sharded_later():
        meta = head(classifier())
        shard_layers(meta.model)
        meta(support, query).backward()
        return [whole(p.grad) for p in meta.parameters()]

    attempt("later", sharded_later)

    def weighted(reduction):
        meta = head(shard_layers(classifier()), reduction=reduction)
        meta(support, query, WEIGHTS[2 * rank : 2 * rank + 2]).backward()
        return [whole(p.grad) for p in meta.parameters()]

    attempt("global_mean", lambda: weighted("global_mean"))
    attempt("sum", lambda: weighted("sum"))

    def recomputed_in_the_model():
        model = shard_all(classifier())
        for layer in model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        meta = head(model, task_batching="loop")
        meta(support, query).backward()
        return [whole(p.grad) for p in meta.parameters()]

    attempt("recomputed", recomputed_in_the_model)

    def half_precision():
        meta = head(shard_all(classifier().bfloat16()))
        meta(support, query).backward()
        with torch.autocast("cpu", torch.bfloat16):
            other = head(shard_all(classifier().float()))
            other(support, query).backward()
        return [[whole(p.grad).double() for p in learner.parameters()] for learner in (meta, other)]

    attempt("half", half_precision)

    def clipped():
        """What torch does with lists of sharded parameters alone."""
        meta = head(shard_all(classifier()))
        meta(support, query).backward()
        norm = torch.nn.utils.clip_grad_norm_(meta.parameters(), 1e-3)
        other = head(shard_layers(classifier()))
        other(support, query).backward()
        groups = [[p for p in other.parameters() if isinstance(p, DTensor) is kind] for kind in (True, False)]
        torch.optim.Adam([{"params": group} for group in groups], foreach=True).step()
        return norm.full_tensor()

    attempt("clipped", clipped)
    return found


WEIGHTS = torch.tensor([1.0, 3.0, 2.0, 0.0])
ALONE = "since ranks gather sharded parameters together"
REFUSED = {
    "capture": "ValueError: capture: expected False with sharded parameters, which a replay would need whole, got True",
    "skip": f"ValueError: on_nonfinite: expected 'raise', {ALONE} and none can repeat a call, got 'skip'",
    "check": "ValueError: meta: expected a model that can be copied, which fully_shard's cannot; ",
    "model": "ValueError: model: expected a model that can be copied, which fully_shard's cannot; ",
    "seeds": "ValueError: model: expected parameters that are not sharded to be the same on all ranks, got others in "
    "model.embedding.weight, model.head.weight, model.head.bias; ",
    "policy": "ValueError: model: expected fully_shard without an mp_policy, ",
    "max_norm": "RuntimeError: model.embedding.weight: a forward writes to this sharded parameter ",
    "mesh": "ValueError: model.layers.2.self_attn.in_proj_weight: expected a mesh of all 2 ranks, whose mean the "
    "meta-gradient is, got one of 1",
    "tensors": "ValueError: model.head.weight: expected a parameter that fully_shard has sharded, ",
    "flat": "ValueError: model: expected parameters of its own, got FullyShardedDataParallel, ",
}


def test_what_cannot_work_is_refused_with_the_reason(tmp_path):
    ranks = on_two_processes(tmp_path, attempts, seconds=300)
    learner = head(classifier())
    learner(*batches()).backward()
    for rank, found in enumerate(ranks):
        assert not isinstance(found, str), found
        for name, message in REFUSED.items():
            assert isinstance(found[name], str), name
            assert found[name].startswith(message), found[name]
        assert found["numbers of tasks"] == (
            f"ValueError: support: expected the same number of tasks on every rank, {ALONE}, got {3 - rank} here and 2.5 on "
            "average"
        )
        # Torch's own: it broadcasts parameters as plain tensors.
        assert found["data parallel"].startswith("RuntimeError")
        assert isinstance(found["offloaded"], float)
        assert found["between"] < 1e-12
        gradients, outputs = found["around"]
        assert distance(gradients, [p.grad for p in learner.parameters()]) < 1e-12
        support, query = mine(rank)
        torch.testing.assert_close(outputs, learner.adapt(support)(query[0]))
        exact = [p.grad for p in learner.parameters()]
        for name in ("later", "recomputed"):
            assert distance(found[name], exact) < 1e-12, name
        for reduction, ranks_of_mean in {"global_mean": 1, "sum": 2}.items():
            weighted = head(classifier(), reduction=reduction.removeprefix("global_"))
            weighted(*batches(), WEIGHTS).backward()
            assert distance(found[reduction], [p.grad / ranks_of_mean for p in weighted.parameters()]) < 1e-12, (
                reduction
            )
        for gradients in found["half"]:
            assert distance(gradients, exact) < 0.1
        torch.testing.assert_close(found["clipped"], torch.stack([gradient.norm() for gradient in exact]).norm())
        without, loss, weight, unadapted = found["without"]
        assert torch.equal(without, loss)
        torch.testing.assert_close(weight, learner.model.head.weight.detach())
        torch.testing.assert_close(unadapted, learner.adapt(support, steps=0)(query[0]))
    # None waits for another that failed, before it gathers and after it.
    waiting = "RuntimeError: another rank failed before the meta-gradient; its own error says why"
    assert ranks[1]["batches"] == ranks[0]["bad task"] == waiting
    assert ranks[0]["batches"].startswith("TypeError: support: expected tensors whose first dimension is the task")
    assert ranks[1]["bad task"].startswith(
        "FloatingPointError: support loss: expected finite values, got nan in task 0"
    )
