"""What no inner step changes: ANIL and LoRA beside loops by hand that compute or differentiate as little as they can."""

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
from torch.func import functional_call

import metafast
from metafast.inner import SGD
from metafast.measure import highest_memory
from metafast.models import EncoderClassifier
from metafast.testing import relative_error

LR, WAYS = meta_peers.LR, 5
TASKS, SUPPORT, QUERY = 4, 10, 15
# Width and length, as in the suite meta_step.
ANIL_SIZES = {"S": (64, 32), "M": (128, 64)}
ANIL_STEPS, LORA_STEPS, RANK = 5, 3, 8
OURS = {"metafast": {}, "metafast, captured": {"capture": True}}


class Split(nn.Module):
    """A body that no step adapts, and a head."""

    def __init__(self, width, length):
        super().__init__()
        self.body = EncoderClassifier(WAYS, width=width, max_length=length)
        self.head = self.body.head
        self.body.head = nn.Identity()

    def forward(self, text):
        return self.head(self.body(text))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def anil_by_hand(model, support, query):
    """One task after another. The body runs once for a task's support set, and once for its query set."""
    for task in range(TASKS):
        features = model.body(support[0][task])
        weight, bias = model.head.weight, model.head.bias
        for _ in range(ANIL_STEPS):
            loss = F.cross_entropy(F.linear(features, weight, bias), support[1][task])
            grads = torch.autograd.grad(loss, (weight, bias), create_graph=True)
            weight, bias = weight - LR * grads[0], bias - LR * grads[1]
        loss = F.cross_entropy(F.linear(model.body(query[0][task]), weight, bias), query[1][task])
        (loss / TASKS).backward()


def texts(count, length, device):
    return (
        torch.randint(1, 256, (TASKS, count, length), device=device),
        torch.randint(WAYS, (TASKS, count), device=device),
    )


def anil(what, size, device):
    """A function that leaves the meta-gradient in the parameters of a model, and the model."""
    torch.manual_seed(0)
    model = Split(*ANIL_SIZES[size]).to(device)
    batches = [texts(count, ANIL_SIZES[size][1], device) for count in (SUPPORT, QUERY)]
    if what not in OURS:
        return lambda: anil_by_hand(model, *batches), model
    meta = metafast.ANIL(model, loss_fn, inner=SGD(lr=LR), steps=ANIL_STEPS, head="head.*", **OURS[what])
    return lambda: meta(*batches).backward(), model


def lora(what, size, device):
    """The same for a BERT of 6 layers, width 384, with adapters of rank 8 for all queries and values."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=WAYS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa" if what in OURS else "eager",
    )
    adapters = peft.LoraConfig(r=RANK, target_modules=["query", "value"], lora_dropout=0.0, task_type="SEQ_CLS")
    model = peft.get_peft_model(transformers.BertForSequenceClassification(config), adapters).to(device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    ids = [torch.randint(config.vocab_size, (2, 25, 16), device=device) for _ in range(2)]
    labels = torch.arange(WAYS, device=device).repeat(2, 5)
    batches = [{"input_ids": x, "labels": labels} for x in ids]

    def loss_of(model, batch):
        return model(**batch).loss

    if what in OURS:
        meta = metafast.MAML(model, loss_of, inner=SGD(lr=LR), steps=LORA_STEPS, **OURS[what])
        return lambda: meta(*batches).backward(), model

    def step():
        support, query = batches
        for task in range(2):
            own = {name: p for name, p in model.named_parameters() if p.requires_grad}
            one, other = ({name: x[task] for name, x in batch.items()} for batch in (support, query))
            for _ in range(LORA_STEPS):
                loss = functional_call(model, own, (), one).loss
                grads = torch.autograd.grad(loss, list(own.values()), create_graph=True)
                own = {name: p - LR * g for (name, p), g in zip(own.items(), grads, strict=True)}
            (functional_call(model, own, (), other).loss / 2).backward()

    return step, model


KINDS = {"anil": anil, "lora": lora}


def gradients(step, model):
    model.zero_grad(set_to_none=True)
    step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compared(kind, size, what, bar, measure, device, rounds=None):
    own, model = kind(what, size, device)
    peer, other = kind("loop by hand", size, device)
    assert relative_error(gradients(own, model), gradients(peer, other)) < 1e-3
    # A captured step's first replays are compared with the uncaptured call.
    for _ in range(3):
        own()
    measure(what, own, {"loop by hand": peer}, {"loop by hand": bar}, rounds=rounds)


@pytest.mark.parametrize("size", ANIL_SIZES)
@pytest.mark.parametrize(("what", "bar"), [("metafast", 1.0), ("metafast, captured", 1.2)])
def test_anil(what, bar, size, measure, device, benchmark):
    benchmark.group = f"ANIL, {size}, {ANIL_STEPS} steps"
    compared(anil, size, what, bar, measure, device)


@pytest.mark.parametrize("what", OURS)
def test_lora(what, measure, device, benchmark):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    benchmark.group = f"LoRA of rank {RANK}, BERT of 6 layers, width 384"
    compared(lora, "", what, 1.3, measure, device, rounds=5)


@pytest.mark.parametrize(("kind", "size", "bar"), [("anil", "S", 1.0), ("anil", "M", 1.0), ("lora", "", 1 / 0.7)])
def test_memory(kind, size, bar, compare, device, benchmark):
    if kind == "lora" and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    benchmark.group = f"memory of {kind} {size}".rstrip()
    found = benchmark.pedantic(in_a_fresh_process, (__file__, kind, size, "metafast", device), rounds=1)
    benchmark.extra_info["what"] = "metafast"
    benchmark.extra_info["peak_bytes"] = found["peak"]
    other = in_a_fresh_process(__file__, kind, size, "loop by hand", device)
    compare("memory", "loop by hand", found["peak"], other["peak"], bar)


def measured(kind: str, size: str, what: str, device: str) -> dict[str, float]:
    """In this process: bytes above those before the step."""
    # The first call of anything loads libraries, which are no memory of a step.
    meta_peers.loop(nn.Linear(2, 2), *[(torch.randn(1, 2, 2), torch.zeros(1, 2, dtype=torch.int64))] * 2, 1, "MAML")
    step, _ = KINDS[kind](what, size, device)
    before = torch.cuda.memory_allocated() if device == "cuda" else highest_memory()
    step()
    return {"peak": highest_memory(device) - before}


if __name__ == "__main__":
    print(json.dumps(measured(*sys.argv[1:5])))
