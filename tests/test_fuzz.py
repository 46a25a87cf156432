"""Random models under random learners beside the plain loop, and random calls of the ops beside torch, in float64.

A failure prints the example and a blob that repeats it (``@reproduce_failure``). METAFAST_FUZZ_EXAMPLES says how many there
are; `make fuzz` takes 5000.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from differential import difference
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from plain_learners import PlainLearner
from random_models import TASKS, WAYS, Loss, batch, models
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.engine import embedding_table
from metafast.inner import SGD, Adam, AdamW, RMSprop
from metafast.program import NotRecordableError

EXAMPLES = int(os.environ.get("METAFAST_FUZZ_EXAMPLES", 200))
# Recording takes seconds.
CAPTURE = [False] * 39 + [True]
fuzz = settings(
    max_examples=EXAMPLES,
    # Said once more, since torch's test utilities load a profile of theirs.
    derandomize=False,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
seeds = st.integers(0, 2**31 - 1)
RATES = ("number", "step", "tensor", "tensor_step", "parameter", "parameter_step")


@st.composite
def rules(draw, kind):
    """A rule with whatever options; eps is large, so that no rounding error is divided by it."""
    options = {"lr": draw(st.sampled_from([0.05, 0.2]))}
    options["weight_decay"] = draw(st.sampled_from([0.0, 0.1]))
    options["clip_norm"] = draw(st.sampled_from([None, 0.5]))
    options["clip_value"] = draw(st.sampled_from([None, 0.3]))
    options["maximize"] = draw(st.sampled_from([False, False, True]))
    granularity = draw(st.sampled_from([None, *RATES[: 4 if kind == "ProtoMAML" else 6]]))
    if kind != "Reptile" and granularity is not None:
        options["learn"] = {"lr": granularity}
        if options["weight_decay"] and draw(st.booleans()):
            options["learn"]["weight_decay"] = draw(st.sampled_from(RATES[:4]))
        options["learn_log"] = draw(st.booleans())
    rule = draw(st.sampled_from([SGD, SGD, Adam, AdamW, RMSprop]))
    if rule is SGD:
        options["momentum"] = draw(st.sampled_from([0.0, 0.9]))
        options["nesterov"] = options["momentum"] > 0 and draw(st.booleans())
        if options["momentum"] and not options["nesterov"]:
            options["dampening"] = draw(st.sampled_from([0.0, 0.3]))
    elif rule is RMSprop:
        options |= {"eps": 0.1, "momentum": draw(st.sampled_from([0.0, 0.5])), "centered": draw(st.booleans())}
    else:
        options |= {"eps": 0.1, "eps_root": draw(st.sampled_from([0.0, 0.01]))}
    return rule(**options)


@st.composite
def learners(draw):
    """A learner, and the kind of its model's inputs."""
    kind = draw(st.sampled_from(["MAML", "MAML", "MAML", "ANIL", "MetaSGD", "Reptile", "ProtoMAML", "ProtoNet"]))
    torch.manual_seed(draw(seeds))
    prototypes = kind in ("ProtoMAML", "ProtoNet")
    model, inputs = draw(models(embedding=prototypes))
    loss = Loss(draw(st.sampled_from([0.0, 0.1])) if kind != "ProtoNet" else 0.0, draw(st.booleans()))
    options = {
        "tasks_per_chunk": draw(st.sampled_from([None, None, 1, 2])),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "capture": draw(st.sampled_from(CAPTURE)),
    }
    if prototypes:
        options["ways"] = WAYS
    if kind != "ProtoNet":
        options["inner"] = draw(rules(kind))
        options["steps"] = draw(st.integers(1, 3))
        options["micro_batches"] = draw(st.sampled_from([1, 1, 1, 2]))
        if kind != "Reptile":
            options["order"] = draw(st.sampled_from([2, 2, 1]))
            options["checkpoint"] = draw(st.booleans())
            if draw(st.booleans()):
                options["step_weights"] = [draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in range(options["steps"])]
        if kind == "ANIL":
            options["head"] = "head.*"
        elif draw(st.booleans()):
            trained = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
            patterns = [pattern for pattern in ("head.*", "*.weight", "*bias*") if fnmatch.filter(trained, pattern)]
            options["adapt_parameters"] = draw(st.sampled_from(patterns))
    return getattr(metafast, kind)(model, loss, **options), inputs


def outcome(meta, batches, task_weights):
    """What a call leaves: the loss, the gradients by name, and buffers."""
    meta.zero_grad()
    loss = meta(*batches, task_weights)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in meta.named_parameters()
        if p.requires_grad
    }
    return loss.detach(), gradients, dict(meta.model.named_buffers())


@pytest.fixture(scope="module", autouse=True)
def tables_are_large():
    """The rows of small embeddings are adapted by themselves, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_table, "LEAST_ROWS", 1)
        yield


@fuzz
@given(data=st.data())
def test_random_learners_are_the_plain_loop(data):
    with warnings.catch_warnings():
        # Torch's, of masks and of nested tensors.
        warnings.filterwarnings("ignore", module="torch")
        meta, inputs = data.draw(learners(), label="learner")
        examples, seed = data.draw(st.integers(2, 4)), data.draw(seeds)
        ignored, weighted = data.draw(st.booleans()), data.draw(st.booleans())
        own = meta.steps > 0 and data.draw(st.booleans())
        torch.manual_seed(seed)
        # Labels are ignored in query sets alone, since prototypes and micro-batches need all.
        for call in range(2):
            sets = [batch(inputs, examples, False) for _ in range(max(meta.steps, 1) if own else 1)]
            query = batch(inputs, 3, ignored)
            if isinstance(meta, metafast.ProtoNet):
                # A class without support is infinitely far.
                sets[0][1][:, :2] = torch.tensor([0, 1])
                query[1].clamp_(max=1)
            support = metafast.PerStep(sets) if own else sets[0]
            steps = sets if own else sets * max(meta.steps, 1)
            weights = torch.rand(TASKS, dtype=torch.float64) if weighted else None
            plain = PlainLearner(meta)
            start = copy.deepcopy(dict(meta.model.named_parameters()))
            try:
                loss, gradients, buffers = plain(steps, query, weights)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                # A bound of norms writes to a weight that an earlier look-up of the loop needs.
                note(str(error))
                return
            if not loss.isfinite():
                note("not finite in the plain loop")
                return
            try:
                found_loss, found, found_buffers = outcome(meta, (support, query), weights)
            except NotRecordableError as error:
                # Of all that is drawn, a bound of norms alone, which writes to a parameter.
                if "the forward writes to the parameter" not in str(error):
                    raise
                return
            problem = (
                difference({"": found_loss}, {"": loss}, "loss")
                or difference(found, gradients, "gradient of ")
                or difference(found_buffers, buffers, "buffer ")
                or difference(dict(meta.model.named_parameters()), dict(plain.model.named_parameters()), "parameter ")
            )
            assert problem is None, f"call {call + 1}: {problem}"
            if any(not torch.equal(start[name], p) for name, p in meta.model.named_parameters()):
                # A bound of norms has changed them, and would again.
                return
        copy.deepcopy(meta.model)
        if not isinstance(meta, metafast.ProtoNet):
            plain = PlainLearner(meta)
            adapted = plain.adapt(steps, meta.steps)
            for name, values in meta.adapt(support).params.items():
                own_name = name.removeprefix("body.") if plain.headed else name
                key = own_name if own_name in adapted[0] else "$" + name
                expected = torch.stack([params[key] for params in adapted])
                problem = difference({name: values}, {name: expected}, "adapted ")
                assert problem is None, problem


@settings(fuzz, max_examples=max(EXAMPLES // 2, 1))
@given(data=st.data())
def test_random_attention_is_torchs(data):
    torch.manual_seed(data.draw(seeds))
    lead = tuple(data.draw(st.lists(st.integers(1, 3), min_size=0, max_size=2), label="lead"))
    heads = data.draw(st.sampled_from([1, 2, 4]), label="heads")
    key_heads = data.draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0]), label="key heads")
    rows, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    width, value_width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    kind = data.draw(st.sampled_from([None, "causal", "boolean", "additive", "additive, broadcast"]), label="mask")
    scale = data.draw(st.sampled_from([None, 0.3]))
    query, key, value = (
        torch.randn(*lead, h, n, d, dtype=torch.float64, requires_grad=True)
        for h, n, d in ((heads, rows, width), (key_heads, columns, width), (key_heads, columns, value_width))
    )
    mask = None
    if kind == "boolean":
        mask = torch.rand(rows, columns) < 0.7
        mask[:, 0] = True
    elif kind is not None and kind.startswith("additive"):
        shape = (heads, rows, columns) if kind == "additive" else (rows, 1)
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=True).expand(*shape[:-1], columns)
    inputs = [x for x in (query, key, value, mask) if x is not None and x.requires_grad]
    options = {"attn_mask": mask, "is_causal": kind == "causal", "scale": scale, "enable_gqa": key_heads != heads}
    found = _to_second_order(metafast.scaled_dot_product_attention, (query, key, value), inputs, options)
    with sdpa_kernel(SDPBackend.MATH):
        expected = _to_second_order(F.scaled_dot_product_attention, (query, key, value), inputs, options)
    problem = difference(found, expected)
    assert problem is None, problem


def _to_second_order(function, arguments, inputs, options):
    out = function(*arguments, **options)
    weights = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    first = torch.autograd.grad((weights * out.sin()).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)
    return {
        "out": out.detach(),
        **{f"derivative {i}": g.detach() for i, g in enumerate(first)},
        **{f"second derivative {i}": g for i, g in enumerate(second)},
    }


@settings(fuzz, max_examples=max(EXAMPLES // 4, 1))
@given(data=st.data())
def test_random_layers_are_torchs(data):
    """Linear, layer norm, RMS norm and GELU as accelerated models have them."""
    torch.manual_seed(data.draw(seeds))
    width = data.draw(st.integers(1, 17))
    lead = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    kind = data.draw(st.sampled_from(["linear", "LayerNorm", "RMSNorm", "gelu", "gelu, tanh"]))
    flags = data.draw(st.booleans()), data.draw(st.booleans())
    layer = {
        "linear": lambda: torch.nn.Linear(width, data.draw(st.integers(1, 9)), bias=flags[0]),
        "LayerNorm": lambda: torch.nn.LayerNorm(width, elementwise_affine=flags[0], bias=flags[1]),
        "RMSNorm": lambda: torch.nn.RMSNorm(width, elementwise_affine=flags[0], eps=1e-5),
        "gelu": lambda: torch.nn.GELU(),
        "gelu, tanh": lambda: torch.nn.GELU(approximate="tanh"),
    }[kind]().double()
    x = torch.randn(*lead, width, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = _to_second_order(layer, (x,), inputs, {})
    with metafast.accelerate(layer):
        found = _to_second_order(layer, (x,), inputs, {})
    problem = difference(found, expected)
    assert problem is None, problem
    assert not math.isnan(float(found["out"].sum()))
