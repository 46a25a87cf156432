"""Peak memory of one second-order MAML step by the number of inner steps, each measurement in a fresh process.

The bar: 20 steps of a 4-layer, 256-wide model, length 128, 10 support examples, one task; 5.2 GB with higher.
On the CPU it is the process's highest resident size above the one before the step, on a GPU the allocator's. A case takes
one to three minutes on two cores, of which 20 steps of a peer are most.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from fresh_process import in_a_fresh_process
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.measure import highest_memory
from metafast.models import EncoderClassifier

LR = 0.01
WIDTH, LENGTH, LAYERS, SUPPORT, QUERY = 256, 128, 4, 10, 15
STEPS = [5, 20]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def ours(model, support, query, steps, checkpoint):
    meta = metafast.MAML(
        model, loss_fn, inner=metafast.inner.SGD(lr=LR), steps=steps, checkpoint=checkpoint, task_batching="vmap"
    )
    return torch.autograd.grad(meta(support, query), list(model.parameters()))


def plain(model, support, query, steps):
    with sdpa_kernel(SDPBackend.MATH):
        params = dict(model.named_parameters())
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model, params, (support[0][0],)), support[1][0])
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        loss = F.cross_entropy(functional_call(model, params, (query[0][0],)), query[1][0])
        return torch.autograd.grad(loss, list(model.parameters()))


def higher(model, support, query, steps):
    import higher as library

    opt = torch.optim.SGD(model.parameters(), lr=LR)
    with (
        sdpa_kernel(SDPBackend.MATH),
        library.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt),
    ):
        for _ in range(steps):
            diffopt.step(F.cross_entropy(fmodel(support[0][0]), support[1][0]))
        loss = F.cross_entropy(fmodel(query[0][0]), query[1][0])
        return torch.autograd.grad(loss, list(model.parameters()))


WAYS = {
    "metafast, checkpointed": functools.partial(ours, checkpoint=True),
    "metafast": functools.partial(ours, checkpoint=False),
    "plain loop": plain,
    "higher": higher,
}
PEERS = ["plain loop", *(["higher"] if importlib.util.find_spec("higher") else [])]


def drawn(width, length, device):
    model = EncoderClassifier(5, width=width, layers=LAYERS, max_length=length).to(device)
    return model, *(
        (torch.randint(1, 256, (1, n, length), device=device), torch.randint(0, 5, (1, n), device=device))
        for n in (SUPPORT, QUERY)
    )


def measured(what: str, steps: int, device: str) -> dict[str, float]:
    """In this process: bytes above the baseline, and the meta-gradient's norm and one product, to compare."""
    torch.manual_seed(0)
    # A small step first: what a library loads or keeps from its first call is no memory of a step.
    WAYS[what](*drawn(32, 16, device), 1)
    model, *batches = drawn(WIDTH, LENGTH, device)
    direction = [torch.randn_like(p) for p in model.parameters()]
    before = torch.cuda.memory_allocated() if device == "cuda" else highest_memory()
    grads = WAYS[what](model, *batches, steps)
    peak = highest_memory(device) - before
    return {
        "peak": peak,
        "norm": torch.stack([g.norm() for g in grads]).norm().item(),
        "product": sum((g * d).sum().item() for g, d in zip(grads, direction, strict=True)),
        "parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


@pytest.mark.parametrize("what", ["metafast, checkpointed", "metafast"])
@pytest.mark.parametrize("steps", STEPS)
def test_memory(what, steps, compare, device, benchmark):
    # Every way once for every number of steps; what the peers took is kept for the next benchmark.
    benchmark.group = f"memory, MAML of {steps} steps"
    found = benchmark.pedantic(in_a_fresh_process, (__file__, what, str(steps), device), rounds=1)
    benchmark.extra_info["what"] = what
    benchmark.extra_info["peak_bytes"] = found["peak"]
    benchmark.extra_info["plot"] = {"figure": "memory", "panel": "one MAML step", "x": steps, "xlabel": "inner steps"}
    for peer in PEERS:
        other = in_a_fresh_process(__file__, peer, str(steps), device)
        assert found["norm"] == pytest.approx(other["norm"], rel=1e-3)
        assert found["product"] == pytest.approx(other["product"], rel=1e-3, abs=1e-3 * other["norm"])
        is_bar = peer == "higher" and steps == STEPS[-1] and what == "metafast, checkpointed"
        compare("memory", peer, found["peak"], other["peak"], 5 if is_bar else None)


def test_memory_of_a_further_step(compare, device, benchmark):
    """At most 1.5 times the adapted parameters."""
    benchmark.group = "memory, each further step"
    what = "metafast, checkpointed"
    fewest, most = benchmark.pedantic(lambda: [in_a_fresh_process(__file__, what, str(n), device) for n in STEPS])
    benchmark.extra_info["what"] = what
    one = (most["peak"] - fewest["peak"]) / (STEPS[-1] - STEPS[0])
    compare("memory", "the parameters", one, most["parameters"], 1 / 1.5)


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
