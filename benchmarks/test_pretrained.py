"""A second-order MAML step of a BERT of real size: 6 layers, width 384, as MiniLM, 5-way 5-shot, 16 tokens, 3 inner steps.

Weights are random: time and memory do not depend on them. The peers are a plain loop over tasks with transformers' eager
attention, since torch's fused attention has no second derivative, and higher. Time is taken side by side, memory in a fresh
process for each, as ``test_memory.py`` does. A case takes about a minute on two cores.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import meta_peers
import pytest
import torch
import torch.nn.functional as F
from fresh_process import in_a_fresh_process
from torch import nn

import metafast
from metafast.inner import SGD, Adam
from metafast.measure import highest_memory, seconds_of
from metafast.testing import relative_error

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

WAYS, SHOTS, TOKENS, STEPS = 5, 5, 16, 3
WORDS, MANY_WORDS = 30522, 250_000
RULES = {"SGD": SGD(lr=meta_peers.LR), "Adam": Adam(lr=1e-4, eps=1e-4)}
OURS = {"metafast": {}, "metafast, captured": {"capture": True}, "metafast, checkpointed": {"checkpoint": True}}
PEERS = ["plain loop", *(["higher"] if importlib.util.find_spec("higher") else [])]


class Logits(nn.Module):
    """A BERT as a function of ids alone."""

    def __init__(self, attention, words, layers, width):
        import transformers

        super().__init__()
        config = transformers.BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            intermediate_size=4 * width,
            num_labels=WAYS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation=attention,
        )
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, ids):
        return self.bert(input_ids=ids).logits


def draw(tasks, device, words=WORDS):
    """A support and a query set of all tasks."""
    labels = torch.arange(WAYS, device=device).repeat(tasks, SHOTS)
    return [(torch.randint(words, (tasks, WAYS * SHOTS, TOKENS), device=device), labels) for _ in range(2)]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def stepper(what, device, rule="SGD", words=WORDS, layers=6, width=384):
    """A function of support and query that leaves the meta-gradient in the parameters of a model, and the model."""
    torch.manual_seed(0)
    model = Logits("sdpa" if what in OURS else "eager", words, layers, width).to(device)
    if what in OURS:
        meta = metafast.MAML(model, loss_fn, inner=RULES[rule], steps=STEPS, **OURS[what])
        return lambda support, query: meta(support, query).backward(), model

    def step(support, query):
        for p, gradient in zip(
            model.parameters(), meta_peers.PEERS[what](model, support, query, STEPS, "MAML"), strict=True
        ):
            p.grad = gradient if p.grad is None else p.grad + gradient

    return step, model


def gradients(step, model, batches):
    model.zero_grad(set_to_none=True)
    step(*batches)
    # As one vector: biases of keys have the gradient 0, and what rounding makes of it.
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("tasks", [2, 8])
@pytest.mark.parametrize("what", ["metafast", "metafast, captured"])
def test_time(what, tasks, measure, device, benchmark):
    benchmark.group = f"BERT, 6 layers, width 384, {tasks} tasks"
    batches = draw(tasks, device)
    own, model = stepper(what, device)
    found = gradients(own, model, batches)
    peers = {}
    for name in PEERS if tasks == 2 else PEERS[:1]:
        step, other = stepper(name, device)
        assert relative_error(found, gradients(step, other, batches)) < 1e-3
        peers[name] = lambda step=step: step(*batches)
    bar = 1.6 if what == "metafast, captured" and tasks == 2 else 1.2
    # A captured step's first replays are compared with the uncaptured call.
    for _ in range(3 if "captured" in what else 0):
        own(*draw(tasks, device))
    measure(what, lambda: own(*batches), peers, dict.fromkeys(peers, bar), rounds=5 if tasks == 2 else 3)


@pytest.mark.parametrize("tasks", [2, 8])
@pytest.mark.parametrize("what", ["metafast", "metafast, checkpointed"])
def test_memory(what, tasks, compare, device, benchmark):
    benchmark.group = f"memory of BERT, 6 layers, width 384, {tasks} tasks"
    found = benchmark.pedantic(in_a_fresh_process, (__file__, what, str(tasks), device, "SGD", str(WORDS)), rounds=1)
    benchmark.extra_info["what"] = what
    benchmark.extra_info["peak_bytes"] = found["peak"]
    for peer in PEERS:
        other = in_a_fresh_process(__file__, peer, str(tasks), device, "SGD", str(WORDS))
        assert found["norm"] == pytest.approx(other["norm"], rel=1e-3)
        compare("memory", peer, found["peak"], other["peak"], 1 / 0.7 if what == "metafast" else 1 / 0.4)


@pytest.mark.parametrize("rule", RULES)
def test_vocabulary(rule, measure, compare, device, benchmark):
    """Beside the same step with few words. The memory is that without the gradients of the parameters."""
    benchmark.group = f"vocabulary of {MANY_WORDS}, {rule}"
    steps = {}
    for words in (WORDS, MANY_WORDS):
        step, _ = stepper("metafast", device, rule, words)
        batches = draw(2, device, words)
        step(*batches)
        steps[words] = lambda step=step, batches=batches: step(*batches)
    measure("metafast", steps[MANY_WORDS], {f"{WORDS} words": steps[WORDS]}, {f"{WORDS} words": 1 / 1.1}, rounds=5)
    few, many = (
        in_a_fresh_process(__file__, "metafast", "2", device, rule, str(words)) for words in (WORDS, MANY_WORDS)
    )
    compare("memory", f"{WORDS} words", *(of["peak"] - of["gradients"] for of in (many, few)), 1 / 1.1)


@pytest.mark.parametrize(("layers", "width", "bar"), [(6, 384, 8), (12, 768, 20)])
def test_recording(layers, width, bar, compare, device, benchmark):
    """Seconds that the first call takes more than the next one, beside the bar."""
    benchmark.group = f"recording of BERT, {layers} layers, width {width}"
    step, _ = stepper("metafast, captured", device, layers=layers, width=width)
    # Of one task: chunks after the first one are compared with the uncaptured call.
    batches = draw(1, device)
    benchmark.pedantic(step, batches, rounds=1)
    benchmark.extra_info["what"] = "metafast, captured: recording"
    replay = seconds_of(lambda: step(*batches), device)
    compare("time", "the bar", benchmark.stats.stats.median - replay, float(bar), 1)


def measured(what: str, tasks: int, device: str, rule: str, words: int) -> dict[str, float]:
    """In this process: bytes above those before the step, and the norm of the meta-gradient to compare."""
    # A small step first: what a library loads or keeps from its first call is no memory of a step.
    stepper(what, device, rule, 100, layers=1, width=64)[0](*draw(1, device, 100))
    step, model = stepper(what, device, rule, words)
    batches = draw(tasks, device, words)
    before = torch.cuda.memory_allocated() if device == "cuda" else highest_memory()
    step(*batches)
    peak = highest_memory(device) - before
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "peak": peak,
        "norm": torch.stack([g.norm() for g in grads]).norm().item(),
        "gradients": sum(g.nbytes for g in grads),
    }


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5]))))
