"""Attention of every order against torch's kernels, FlexAttention and jvp_flash_attention.

``-k`` picks parts by order (forward, backward, second, jvp), dtype, peer or shape, for example ``-k "second and 1024"``.
"""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch
import torch.autograd.forward_ad as fw
from attention_peers import math, prepared
from fresh_process import in_a_fresh_process

from metafast.measure import highest_memory
from metafast.testing import AttentionCase, AttentionInputs, relative_error

CUDA = torch.cuda.is_available()
# What is done in Python and at the calls takes longer here than the arithmetic.
OVERHEAD = (8, 32, 16)
# (batch x heads, length, head dimension), and the bar for the second order in float32.
SHAPES = {
    OVERHEAD: 1.0,
    (512, 32, 16): 1.5,
    (256, 64, 32): 1.5,
    (128, 128, 32): 2.0,
    (32, 512, 64): 2.5,
    (16, 1024, 64): 2.5,
    (8, 2048, 64): 3.0,
}
LONG = (8, 4096, 64)
MASKS = {
    "causal": {"is_causal": True},
    "window": {"window_size": (64, 64)},
    # Added to the scores, with a gradient of its own.
    "bias": {"mask": "bias of heads"},
}
# (batch x heads, queries, keys, head dimension): the last queries of a long sequence, each with a window of keys before it.
# Bars in float32, for time and memory, against a dense mask.
LAST_QUERIES = [(8, 1024, 9216, head_dim) for head_dim in (64, 80, 96)]
LOCAL = {"window_size": (8191, 0), "query_offset": 8192}
LOCAL_BARS = 3.0, 20
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if CUDA else [])]
PEERS = {
    "forward": ["math", "torch", "flex"],
    "backward": ["math", "torch", "flex"],
    "second": ["math", "math in float32"],
    "jvp": ["math", "jvp_flash"],
}


def leaves(inputs):
    """What is differentiated, and the options that carry the bias among it."""
    found, options = [x.detach().requires_grad_() for x in inputs.qkv], dict(inputs.options)
    if inputs.tangent_mask is not None and "attn_mask" in options:
        found.append(options["attn_mask"].detach().requires_grad_())
        options["attn_mask"] = found[3]
    return found, options


def forward(function, inputs):
    return [function(*inputs.qkv, **inputs.options)]


def backward(function, inputs):
    primals, options = leaves(inputs)
    out = function(*primals[:3], **options)
    return [out.detach(), *torch.autograd.grad(out, primals, inputs.grad_out)]


def graph_of_gradients(function, inputs):
    primals, options = leaves(inputs)
    grad_out = inputs.grad_out.detach().requires_grad_()
    out = function(*primals[:3], **options)
    grads = torch.autograd.grad(out, primals, grad_out, create_graph=True)
    tangents = [*inputs.tangents, *([inputs.tangent_mask] if len(primals) == 4 else [])]
    return out, grads, [*primals, grad_out], tangents


def second(function, inputs):
    out, grads, primals, tangents = graph_of_gradients(function, inputs)
    return [out.detach(), *(g.detach() for g in grads), *torch.autograd.grad(grads, primals, tangents)]


def jvp(function, inputs):
    with fw.dual_level():
        duals = [fw.make_dual(x, t) for x, t in zip(inputs.qkv, inputs.tangents, strict=True)]
        return list(fw.unpack_dual(function(*duals, **inputs.options)))


ORDERS = {"forward": forward, "backward": backward, "second": second, "jvp": jvp}


def draw(shape, dtype, device, mask="") -> AttentionInputs:
    heads, *lengths, head_dim = shape
    options = {**MASKS, "local": LOCAL}.get(mask, {})
    case = AttentionCase("", lengths[0], lengths[-1], head_dim, lead=(1,), heads=heads, **options)
    return case.inputs(dtype, torch.Generator().manual_seed(0), device)


@functools.lru_cache(maxsize=1)
def reference(order, shape, dtype, device, mask):
    """The math backend's in float32, from the numbers as ``dtype`` rounds them."""
    function, inputs = prepared("math in float32", draw(shape, dtype, device, mask))
    return ORDERS[order](function, inputs)


def name_of(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def skip_what_cannot_run(peer, order, dtype, device, compiling):
    if peer == "math in float32" and dtype == torch.float32:
        pytest.skip("the same as math")
    if peer == "flex" and order == "backward" and device == "cpu":
        pytest.skip("FlexAttention has no backward on the CPU")
    if peer == "flex" and not compiling:
        pytest.skip("FlexAttention takes torch.compile half a minute: --compile")


def bar_of(order, shape, dtype, peer, mask):
    if mask:
        return LOCAL_BARS[0] if mask == "local" else None
    length = shape[1]
    if order == "backward" and peer == "torch" and shape != OVERHEAD:
        return 0.9
    if order != "second":
        return None
    if peer == "math" and dtype == torch.float32:
        return SHAPES.get(shape)
    return {"math": 2.0, "math in float32": 5.0}[peer] if dtype == torch.bfloat16 and length >= 512 else None


def compare_with(peer, order, shape, dtype, device, compiling, measure, mask=""):
    skip_what_cannot_run(peer, order, dtype, device, compiling)
    run, inputs = ORDERS[order], draw(shape, dtype, device, mask)
    own, others = prepared("metafast", inputs), prepared(peer, inputs)
    expected = reference(order, shape, dtype, device, mask)
    # In float32 the math backend is the reference itself.
    is_reference = peer == "math in float32" or (peer == "math" and dtype == torch.float32)
    for name, (function, given) in {"metafast": own, **({} if is_reference else {peer: others})}.items():
        found = run(function, given)
        # A peer without a gradient for the mask gives the first ones.
        errors = [relative_error(value, exact) for value, exact in zip(found, expected, strict=False)]
        assert max(errors) < TOLERANCES[dtype], (name, errors)
    bar = bar_of(order, shape, dtype, peer, mask)
    measure("metafast", lambda: run(*own), {peer: lambda: run(*others)}, {peer: bar})


@pytest.mark.parametrize(("order", "peer"), [(order, peer) for order in PEERS for peer in PEERS[order]])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_order(shape, dtype, order, peer, measure, device, compiling, benchmark):
    benchmark.group = f"attention {order} {name_of(dtype)} {name_of(shape)}"
    benchmark.extra_info["plot"] = {
        "figure": "attention",
        "panel": f"{order}, {name_of(dtype)}",
        "x": shape[1],
        "xlabel": "length",
    }
    compare_with(peer, order, shape, dtype, device, compiling, measure)


@pytest.mark.parametrize(
    ("order", "peer"), [("backward", "math"), ("backward", "torch"), ("backward", "flex"), ("second", "math")]
)
@pytest.mark.parametrize("mask", MASKS)
def test_mask(mask, order, peer, measure, device, compiling, benchmark):
    shape = (32, 512, 64)
    benchmark.group = f"attention {order} {mask} float32 {name_of(shape)}"
    compare_with(peer, order, shape, torch.float32, device, compiling, measure, mask)


@pytest.mark.parametrize("shape", LAST_QUERIES, ids=name_of)
def test_last_queries(shape, measure, device, benchmark):
    benchmark.group = f"attention second local float32 {name_of(shape)}"
    compare_with("math", "second", shape, torch.float32, device, False, measure, "local")


@pytest.mark.parametrize("shape", LAST_QUERIES, ids=name_of)
def test_memory_of_last_queries(shape, compare, device, benchmark):
    benchmark.group = f"attention memory, second local float32 {name_of(shape)}"
    found = memories(shape, device)
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["what"] = "metafast"
    compare("memory", "math", found["metafast"]["peak"], found["math"]["peak"], LOCAL_BARS[1])


@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_memory(length, compare, device, benchmark):
    benchmark.group = f"attention memory, second float32 8x{length}x64"
    found = memories((8, length, 64), device)
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["what"] = "metafast"
    benchmark.extra_info["plot"] = {
        "figure": "attention",
        "panel": "second, float32, memory",
        "x": length,
        "xlabel": "length",
    }
    bar = 20 if length == LONG[1] else None
    compare("memory", "math", found["metafast"]["peak"], found["math"]["peak"], bar)


def memories(shape, device):
    """Above what the process holds with the inputs; on the CPU resident memory, which sees the scratch of our threads."""
    found = {
        name: in_a_fresh_process(__file__, name, ",".join(map(str, shape)), device) for name in ("math", "metafast")
    }
    assert found["metafast"]["norm"] == pytest.approx(found["math"]["norm"], rel=1e-4)
    return found


def memory(peer, shape, device):
    """In this process: the most that a second-order step held, after a small one has loaded what every step needs."""

    def inputs(heads, rows, columns, head_dim):
        # Drawn as they are used: what the case table rounds from float64 would count as the highest.
        query, key, value, grad_out, *tangents = (
            torch.randn(1, heads, length, head_dim, device=device)
            for length in (rows, columns, columns, rows, rows, columns, columns)
        )
        options = {"attn_mask": None, "is_causal": False, "window_size": None, "query_offset": 0}
        options |= {"key_start": None, "key_length": None, **(LOCAL if shape in LAST_QUERIES else {})}
        return AttentionInputs(query, key, value, grad_out, tuple(tangents), None, options)

    heads, *lengths, head_dim = shape
    torch.manual_seed(0)
    second(*prepared(peer, inputs(heads, 64, 64, head_dim)))
    function, given = prepared(peer, inputs(heads, lengths[0], lengths[-1], head_dim))
    before = torch.cuda.memory_allocated() if device == "cuda" else highest_memory()
    results = second(function, given)
    return {"peak": highest_memory(device) - before, "norm": sum(x.norm().item() for x in results)}


# Matrix products that a pass is counted at (a GPU's double backward is split and makes some again), and how the
# products of the double backward divide: weights from rows, rows from weights, keys from weights.
GEMMS = {"forward": 2, "backward": 5, "jvp": 5, "double backward": 15 if CUDA else 12}
DOUBLE_BACKWARD = (5, 4, 3)
GPU_BARS = {64: (350, 230, 300, 200), 128: (450, 280, 350, 220)}


def passes(inputs):
    """Each pass alone; the ones before it have run."""
    primals, options = leaves(inputs)
    function, _ = prepared("metafast", inputs)
    out = function(*primals, **options)
    _, grads, all_primals, tangents = graph_of_gradients(function, inputs)
    return {
        "forward": lambda: forward(function, inputs),
        "backward": lambda: torch.autograd.grad(out, primals, inputs.grad_out, retain_graph=True),
        "jvp": lambda: jvp(function, inputs),
        # By the inputs alone, as in a meta-gradient whose cotangent is a constant too.
        "double backward": lambda: torch.autograd.grad(grads, all_primals, tangents, retain_graph=True),
    }


def bmm_on_panels(shape, dtype):
    """As many products as a double backward, of panels that stay in cache, one panel a thread."""
    heads, length, head_dim = shape
    threads = torch.get_num_threads()
    # About as csrc/cpu/attention_panels.h chooses it for four buffers.
    height = max(16, 2**20 // (4 * length * 4) // 8 * 8)
    rows, keys, weights = (
        torch.randn(threads, *size, dtype=dtype) for size in ((height, head_dim), (length, head_dim), (height, length))
    )
    out_weights, out_rows, out_keys = weights.clone(), rows.clone(), keys.clone()
    to_weights, to_rows, to_keys = DOUBLE_BACKWARD
    panels = -(-heads * length // (height * threads))

    def call():
        for _ in range(panels):
            for _ in range(to_weights):
                torch.bmm(rows, keys.mT, out=out_weights)
            for _ in range(to_rows):
                torch.bmm(weights, keys, out=out_rows)
            for _ in range(to_keys):
                torch.bmm(weights.mT, rows, out=out_keys)

    return call


@pytest.mark.skipif(CUDA, reason="of the CPU; the GPU has test_rate")
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] >= 1024], ids=name_of)
def test_rate_of_double_backward(shape, measure, device, benchmark):
    # In float32 alone: bmm in bfloat16 on a CPU without such instructions is no measure of anything.
    dtype = torch.float32
    benchmark.group = f"attention GEMM rate, double backward float32 {name_of(shape)}"
    inputs = draw(shape, dtype, device)
    expected = reference("second", shape, dtype, device, "")
    for value, exact in zip(second(*prepared("metafast", inputs)), expected, strict=True):
        assert relative_error(value, exact) < TOLERANCES[dtype]
    peer = "bmm on panels"
    alone = passes(inputs)["double backward"]
    medians = measure("metafast", alone, {peer: bmm_on_panels(shape, dtype)}, {peer: 0.85})
    benchmark.extra_info["gflops"] = 1e-9 * GEMMS["double backward"] * products(shape) / medians[""]


def products(shape):
    heads, length, head_dim = shape
    return 2 * heads * length**2 * head_dim


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize("shape", [(64, 4096, 64), (32, 8192, 64), (32, 4096, 128), (16, 8192, 128)], ids=name_of)
def test_rate(shape, which, measure, compare, device, benchmark):
    benchmark.group = f"attention TFLOP/s, {which} bfloat16 {name_of(shape)}"
    inputs = draw(shape, torch.bfloat16, device)
    one_head = AttentionInputs(
        *(x[:, :1] for x in (*inputs.qkv, inputs.grad_out)),
        tuple(x[:, :1] for x in inputs.tangents),
        None,
        inputs.options,
    )
    _, exact = prepared("math in float32", one_head)
    for value, expected in zip(second(*prepared("metafast", one_head)), second(math, exact), strict=True):
        assert relative_error(value, expected) < TOLERANCES[torch.bfloat16]
    medians = measure("metafast", passes(inputs)[which], {})
    rate = 1e-12 * GEMMS[which] * products(shape) / medians[""]
    # So that the ratio is the rate.
    compare("seconds a TFLOP", "1 TFLOP/s", 1 / rate, 1.0, GPU_BARS[shape[2]][list(GEMMS).index(which)])


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_long_step(measure, device, benchmark):
    shape = (16, 8192, 64)
    benchmark.group = f"attention second bfloat16 {name_of(shape)}"
    compare_with("math", "second", shape, torch.bfloat16, device, False, measure)


if __name__ == "__main__":
    print(json.dumps(memory(sys.argv[1], tuple(map(int, sys.argv[2].split(","))), sys.argv[3])))
