"""MAML of a language model with inner Adam, against MixFlow-MG (Kemaev et al. 2025, arXiv:2505.00793) in JAX.

Both start from the same weights and batches; losses and meta-gradients are found equal before anything is timed. Time is
that of a recorded step against a compiled one. Memory is the highest resident size of a fresh process during a step, above
that before it. In the result file, ``once_seconds`` is the time of recording or compiling, ``with_making`` the memory with
it, and ``planned`` the tensors of a step as XLA and a recording plan them: what the first leaves out is Python's objects.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fresh_process import in_a_fresh_process
from mixflow_model import BETAS, EPS, EPS_ROOT, LR, SETTINGS, Setting, draw, loss_fn

import metafast
from metafast.measure import highest_memory
from metafast.testing import relative_error

OURS: dict[str, dict[str, Any]] = {
    "metafast": {},
    "metafast, checkpointed": {"checkpoint": True},
    # A sequence at a time.
    "metafast, in parts": {"checkpoint": True, "micro_batches": 4},
    "metafast, in parts, uncaptured": {"checkpoint": True, "micro_batches": 4, "capture": False},
}
NAMES = [name for name in SETTINGS if name != "tiny"]
MIXFLOW = "JAX, MixFlow-MG"
JAX = ["JAX, reverse over reverse", MIXFLOW, "JAX, MixFlow-MG, layers kept"]
# Ways that keep all within a step are for time, those that rebuild it for memory: each is compared with its like.
FASTEST = JAX[2]


class Made(NamedTuple):
    """A step, ready to be repeated.

    Attributes:
        call: gives the loss and the meta-gradient.
        once: seconds of compiling; None where the first call makes the step.
        planned: gives, after a call, the bytes of tensors that are planned for a step; 0 where nothing is planned.
    """

    call: Callable[[], tuple[float, list[torch.Tensor]]]
    once: float | None
    planned: Callable[[], int]


def ours(setting: Setting, options: dict[str, Any]) -> Made:
    model, support, query = draw(setting)
    rule = metafast.inner.Adam(lr=LR, betas=BETAS, eps=EPS, eps_root=EPS_ROOT)
    # The uncaptured calls that the first replays are compared with would be part of the figures.
    options = {"capture": True, "capture_check": 0, **options}
    meta = metafast.MAML(model, loss_fn, inner=rule, steps=setting.steps, **options)
    batches = metafast.PerStep(list(support[:, None])), query[None]
    params = list(model.parameters())

    def call() -> tuple[float, list[torch.Tensor]]:
        loss = meta(*batches)
        return loss.item(), list(torch.autograd.grad(loss, params))

    def planned() -> int:
        return sum(kept.program.bytes for kept in meta._step._capture._programs.values())

    return Made(call, None, planned)


def in_jax(setting: Setting, way: str) -> Made:
    import jax
    import mixflow_jax

    model, support, query = draw(setting)
    inputs = mixflow_jax.arrays(model), mixflow_jax.array(support), mixflow_jax.array(query)
    start = time.perf_counter()
    compiled = jax.jit(mixflow_jax.meta_gradient(setting, mixflow_jax.WAYS[way])).lower(*inputs).compile()
    once = time.perf_counter() - start
    planned = compiled.memory_analysis()

    def call() -> tuple[float, list[torch.Tensor]]:
        loss, grads = jax.block_until_ready(compiled(*inputs))
        return float(loss), mixflow_jax.as_tensors(grads, model)

    return Made(call, once, lambda: planned.temp_size_in_bytes)


def made(what: str, setting: Setting) -> Made:
    return ours(setting, OURS[what]) if what in OURS else in_jax(setting, what)


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def measured(what: str, name: str) -> dict[str, float]:
    """In this process: bytes of a step, and of the first with what makes it."""
    # A small step first: what a library loads or keeps from its first call is no memory of a step.
    made(what, SETTINGS["tiny"]).call()
    before = resident()
    step = made(what, SETTINGS[name])
    if step.once is not None:
        # What compiling leaves behind is no memory of a step. Ours counts from before it is recorded.
        before_step = resident()
    else:
        before_step = before
        step.call()
    with_making = highest_memory() - before
    # The highest so far is forgotten: on Linux alone.
    Path("/proc/self/clear_refs").write_text("5")
    loss, grads = step.call()
    peak = highest_memory() - before_step
    return {
        "peak": peak,
        "with_making": max(with_making, peak),
        "planned": step.planned(),
        "loss": loss,
        "norm": torch.stack([g.norm() for g in grads]).norm().item(),
    }


def needs_jax(device: str) -> None:
    if importlib.util.find_spec("jax") is None:
        pytest.skip("MixFlow-MG is written in JAX: pip install jax")
    if device != "cpu":
        pytest.skip("JAX is compared on the CPU")


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return relative_error(*(torch.cat([x.flatten() for x in side]) for side in (found, expected)))


@pytest.mark.parametrize("what", [what for what, options in OURS.items() if options.get("capture", True)])
@pytest.mark.parametrize("name", NAMES)
def test_time(name, what, measure, device, benchmark):
    needs_jax(device)
    setting = SETTINGS[name]
    benchmark.group = f"MixFlow-MG's setting, {name}"
    own = made(what, setting)
    start = time.perf_counter()
    loss, grads = own.call()
    once = {what: time.perf_counter() - start}
    peers = {}
    for peer in JAX:
        other = made(peer, setting)
        peer_loss, peer_grads = other.call()
        assert peer_loss == pytest.approx(loss, rel=1e-5), peer
        assert error(peer_grads, grads) < 1e-4, peer
        peers[peer] = other.call
        once[peer] = other.once
    benchmark.extra_info["once_seconds"] = once
    measure(what, own.call, peers, {MIXFLOW if OURS[what] else FASTEST: 1.0}, rounds=setting.rounds)


@pytest.mark.parametrize("what", OURS)
@pytest.mark.parametrize("name", NAMES)
def test_memory(name, what, compare, device, benchmark):
    needs_jax(device)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the highest resident size can be forgotten on Linux alone")
    benchmark.group = f"MixFlow-MG's setting, {name}, memory"
    found = benchmark.pedantic(in_a_fresh_process, (__file__, what, name), rounds=1)
    benchmark.extra_info["what"] = what
    benchmark.extra_info["peak_bytes"] = found["peak"]
    others = {peer: in_a_fresh_process(__file__, peer, name) for peer in JAX}
    benchmark.extra_info["processes"] = {what: found, **others}
    for peer, other in others.items():
        assert other["loss"] == pytest.approx(found["loss"], rel=1e-5)
        assert other["norm"] == pytest.approx(found["norm"], rel=1e-4)
        bar = 1.0 if peer == MIXFLOW and OURS[what] else None
        compare("memory", peer, found["peak"], other["peak"], bar)
        if found["planned"]:
            compare("memory", f"{peer}, planned", found["planned"], other["planned"])


if __name__ == "__main__":
    print(json.dumps(measured(*sys.argv[1:])))
