"""One MAML step, loss and meta-gradient, against the plain PyTorch loop over tasks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.models import EncoderClassifier


@dataclass(frozen=True)
class Setting:
    name: str
    width: int
    length: int
    tasks: int = 4
    steps: int = 3
    support: int = 10
    query: int = 15


SETTINGS = [Setting("S", 64, 32), Setting("M", 128, 64)]
LR = 0.1


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def draw(setting, device):
    torch.manual_seed(0)
    model = EncoderClassifier(5, width=setting.width, max_length=setting.length).to(device)
    batches = [
        (torch.randint(1, 256, (setting.tasks, n, setting.length)), torch.randint(0, 5, (setting.tasks, n)))
        for n in (setting.support, setting.query)
    ]
    return model, *(tuple(x.to(device) for x in batch) for batch in batches)


def plain_loop(model, support, query, steps, order):
    """MAML as it is written without a library: a loop over tasks, dense attention, which can be differentiated twice."""
    loss = 0.0
    tasks = support[0].shape[0]
    with sdpa_kernel(SDPBackend.MATH):
        for t in range(tasks):
            params = dict(model.named_parameters())
            for _ in range(steps):
                inner = F.cross_entropy(functional_call(model, params, (support[0][t],)), support[1][t])
                grads = torch.autograd.grad(inner, list(params.values()), create_graph=order == 2)
                params = {name: p - LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
            loss = loss + F.cross_entropy(functional_call(model, params, (query[0][t],)), query[1][t]) / tasks
        return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("what", ["metafast", "metafast, checkpointed", "plain loop"])
@pytest.mark.parametrize("order", [2, 1])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_maml(setting, order, what, measure, device, benchmark):
    benchmark.group = f"MAML {setting.name}, order {order}"
    model, support, query = draw(setting, device)
    meta = metafast.MAML(
        model,
        loss_fn,
        inner=metafast.inner.SGD(lr=LR),
        steps=setting.steps,
        order=order,
        checkpoint="checkpointed" in what,
        task_batching="vmap",
    )

    def ours():
        return torch.autograd.grad(meta(support, query), list(model.parameters()))

    def plain():
        return plain_loop(model, support, query, setting.steps, order)

    if what == "plain loop":
        return measure(what, plain)
    with metafast.use_backend("fused"):
        pairs = list(zip(ours(), plain(), strict=True))
        error = sum((a - b).pow(2).sum() for a, b in pairs).sqrt() / sum(b.pow(2).sum() for _, b in pairs).sqrt()
        assert error < 1e-4
        return measure(what, ours, "plain loop", plain)
