"""One meta-gradient of MAML, FOMAML and Reptile against those who compute the same, each with its best attention.

``-k`` picks parts by setting and algorithm, for example ``-k "peers and M-MAML"``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from meta_peers import LR, MODULES, PEERS, func
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.measure import peak_memory, seconds_of
from metafast.models import EncoderClassifier


@dataclass(frozen=True)
class Setting:
    """Sizes, and the bars against the fastest peer for second and first order."""

    name: str
    width: int
    length: int
    tasks: int = 4
    steps: int = 3
    support: int = 10
    query: int = 15
    second: float | None = None
    first: float | None = None
    # None: as many as there is time for.
    rounds: int | None = None


SETTINGS = {
    setting.name: setting
    for setting in [
        Setting("S", 64, 32, second=2.0, first=2.0),
        Setting("M", 128, 64, second=1.4, first=1.5),
        Setting("L", 256, 128, tasks=2, second=1.2, rounds=3),
        Setting("X", 128, 512, tasks=2, steps=2, support=4, second=1.6, rounds=3),
    ]
}


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


def ours(model, support, query, setting, algorithm, checkpoint=False, capture=False):
    inner, options = metafast.inner.SGD(lr=LR), {"steps": setting.steps, "checkpoint": checkpoint, "capture": capture}
    if algorithm == "Reptile":
        meta = metafast.Reptile(model, loss_fn, inner=inner, **options)
        batches = (support,)
    else:
        meta = metafast.MAML(model, loss_fn, inner=inner, order=2 if algorithm == "MAML" else 1, **options)
        batches = (support, query)
    params = list(model.parameters())

    def step():
        with metafast.use_backend("fused"):
            return torch.autograd.grad(meta(*batches), params)

    return step


def peers(model, support, query, setting, algorithm):
    """Those that are installed, each with its best attention.

    The math backend alone can be differentiated twice. For first order torch takes its fused kernel, which vmap runs task
    by task with a warning, so there torch.func competes with both.
    """
    in_math = functools.partial(sdpa_kernel, SDPBackend.MATH)

    def step(peer, attention):
        with attention():
            return peer(model, support, query, setting.steps, algorithm)

    present = {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(MODULES.get(name, "torch"))}
    if algorithm == "MAML":
        return {name: functools.partial(step, peer, in_math) for name, peer in present.items()}
    calls = {name: functools.partial(step, peer, contextlib.nullcontext) for name, peer in present.items()}
    return {**calls, "torch.func, math": functools.partial(step, func, in_math)}


def error(found, expected):
    pairs = list(zip(found, expected, strict=True))
    difference = sum((a - b).double().pow(2).sum() for a, b in pairs).sqrt()
    return (difference / sum(b.double().pow(2).sum() for _, b in pairs).sqrt()).item()


def assert_equal(calls, expected, tolerance=1e-3):
    for name, call in calls.items():
        assert error(call(), expected) < tolerance, name


def place(setting, panel):
    return {"figure": "meta_step", "panel": panel, "x": setting.name, "xlabel": "setting", "y": "ratio"}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("algorithm", ["MAML", "FOMAML", "Reptile"])
@pytest.mark.parametrize("name", SETTINGS)
def test_peers(name, algorithm, measure, device, benchmark):
    """A step whose inputs have the shapes of an earlier one, as in training: replayed."""
    setting = SETTINGS[name]
    benchmark.group = f"{algorithm} {name}"
    benchmark.extra_info["plot"] = place(setting, algorithm)
    batches = draw(setting, device)
    own, others = ours(*batches, setting, algorithm, capture=True), peers(*batches, setting, algorithm)
    assert_equal({**others, "metafast, captured": own}, others["plain loop"]())
    bar = setting.second if algorithm == "MAML" else setting.first
    measure("metafast, captured", own, others, fastest=bar, rounds=setting.rounds)


@pytest.mark.parametrize("algorithm", ["MAML", "FOMAML", "Reptile"])
@pytest.mark.parametrize("name", ["S", "M"])
def test_uncaptured(name, algorithm, measure, device, benchmark):
    """Every step as Python writes it."""
    setting = SETTINGS[name]
    benchmark.group = f"{algorithm} {name}, not captured"
    batches = draw(setting, device)
    own, loop = ours(*batches, setting, algorithm), peers(*batches, setting, algorithm)["plain loop"]
    assert_equal({"metafast": own}, loop())
    bars = {"plain loop": 1.2} if (name, algorithm) == ("S", "MAML") else None
    measure("metafast", own, {"plain loop": loop}, bars, rounds=setting.rounds)


def test_bfloat16(measure, device, benchmark):
    setting = SETTINGS["L"]
    benchmark.group = "MAML L, bfloat16 autocast"
    batches = draw(setting, device)

    def under_autocast(call):
        with torch.autocast(device, dtype=torch.bfloat16):
            return call()

    in_float32 = peers(*batches, setting, "MAML")
    exact = in_float32["plain loop"]()
    own = functools.partial(under_autocast, ours(*batches, setting, "MAML", capture=True))
    others = {f"{name}, bf16": functools.partial(under_autocast, peer) for name, peer in in_float32.items()}
    # As close to float32 as the others are.
    assert error(own(), exact) < 2 * error(others["plain loop, bf16"](), exact)
    # Of either kind the fastest of one look: all of both would take minutes.
    fastest, fastest_in_float32 = (
        min(kind, key=lambda n: seconds_of(kind[n], device)) for kind in (others, in_float32)
    )
    float32 = f"{fastest_in_float32}, float32"
    measure(
        "metafast, captured, bf16",
        own,
        {fastest: others[fastest], float32: in_float32[fastest_in_float32]},
        {fastest: 1.3, float32: 2.2},
        rounds=3,
    )


@pytest.mark.parametrize("capture", [False, True], ids=["uncaptured", "captured"])
@pytest.mark.parametrize("name", ["S", "M", "L"])
def test_checkpointed(name, capture, measure, device, benchmark):
    """At most 1.35 times as long as with kept graphs."""
    setting = SETTINGS[name]
    benchmark.group = f"MAML {name}, checkpointed, {'' if capture else 'not '}captured"
    batches = draw(setting, device)
    rebuilt, kept = (ours(*batches, setting, "MAML", checkpoint, capture) for checkpoint in (True, False))
    assert_equal({"checkpointed": rebuilt}, kept())
    measure("metafast, checkpointed", rebuilt, {"kept graphs": kept}, {"kept graphs": 1 / 1.35}, rounds=setting.rounds)


@pytest.mark.parametrize("name", ["S", "M"])
def test_hessian_product(name, measure, compare, device, benchmark):
    """Reverse over reverse, as a rebuilt inner step takes the product with the Hessian, against forward over reverse.

    No bar: the figures behind the choice. Both run the same products and accelerated layers.
    """
    setting = SETTINGS[name]
    benchmark.group = f"Hessian product {name}"
    model, support, _ = draw(setting, device)
    params = {n: p.detach().expand(setting.tasks, *p.shape).clone() for n, p in model.named_parameters()}
    direction = {n: torch.randn_like(p) for n, p in params.items()}

    def loss(params, *batch):
        return F.cross_entropy(functional_call(model, params, batch[:1]), batch[1])

    def reverse_over_reverse():
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        grads = torch.autograd.grad(vmap(loss)(leaves, *support).sum(), leaves.values(), create_graph=True)
        return torch.autograd.grad(grads, leaves.values(), direction.values())

    def forward_over_reverse():
        def one(params, direction, *batch):
            return jvp(lambda params: grad(loss)(params, *batch), (params,), (direction,))[1]

        return list(vmap(one)(params, direction, *support).values())

    with metafast.use_backend("fused"), metafast.accelerate(model):
        assert_equal({"forward over reverse": forward_over_reverse}, reverse_over_reverse())
        measure("reverse over reverse", reverse_over_reverse, {"forward over reverse": forward_over_reverse})
        own, other = (peak_memory(call, device) for call in (reverse_over_reverse, forward_over_reverse))
        compare("memory", "forward over reverse", own, other)


# torch.compile imports what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_peer(measure, device, compiling, benchmark):
    if not compiling:
        pytest.skip("torch.compile takes minutes for a second-order step: --compile")
    setting = SETTINGS["M"]
    benchmark.group = "MAML M, torch.compile"
    model, support, query = draw(setting, device)
    compiled = torch.compile(lambda: func(model, support, query, setting.steps, "MAML"))

    def peer():
        with sdpa_kernel(SDPBackend.MATH):
            return compiled()

    own = ours(model, support, query, setting, "MAML", capture=True)
    expected = peers(model, support, query, setting, "MAML")["plain loop"]()
    assert_equal({"metafast, captured": own, "compiled": peer}, expected)
    measure("metafast, captured", own, {"torch.func, compiled": peer}, {"torch.func, compiled": 1.2})
