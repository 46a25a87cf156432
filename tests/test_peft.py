"""Adapters of ``peft`` on models of transformers: beside the plain loop with torch.func.functional_call, in float64."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any, NamedTuple

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from plain_loop import adaptation, distance, gradients, meta_gradients, query_losses, task
from some_cases import some
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import metafast

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from huggingface_models import SPECIAL, float64_throughout  # noqa: E402

from metafast.integrations import huggingface  # noqa: E402
from metafast.program import NotRecordableError  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("fused_cpu"),
    # Torch has no batching rule for some op, and runs a loop of its own.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    # Their own deprecations are not ours to fix.
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers"),
    # GPT-2's head, trained apart from the embedding that it is tied to.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    # What peft says of norms, whose weights it trains all the same.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

VOCABULARY, CLASSES, LENGTH = 31, 3, 6
TASKS, EXAMPLES, STEPS, LR, TOLERANCE = 2, 3, 2, 0.1, 1e-9
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    **SPECIAL,
}
ENCODER = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **SPECIAL,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


class Base(NamedTuple):
    """A model before it has an adapter.

    Args:
        model, config: names of the classes in transformers.
        settings: of the configuration.
        kind: the task type, as peft calls it.
        attention: layers that LoRA changes.
        scaled, feedforward: layers that IA3 changes, and which of them on their inputs.
        embedding, norm, head: further layers.
        reference: attention of the plain loop; Llama's eager one computes in float32 whatever the dtype.
    """

    model: str
    config: str
    settings: dict[str, Any]
    kind: str
    attention: list[str]
    scaled: list[str]
    feedforward: list[str]
    embedding: str
    norm: str
    head: str
    reference: str = "eager"


BASES = {
    "bert": Base(
        "BertForSequenceClassification", "BertConfig", ENCODER, "SEQ_CLS", ["query", "value"],
        ["key", "value", "output.dense"], ["output.dense"], "word_embeddings", "LayerNorm", "classifier",
    ),
    "roberta": Base(
        "RobertaForSequenceClassification", "RobertaConfig", ENCODER, "SEQ_CLS", ["query", "value"],
        ["key", "value", "output.dense"], ["output.dense"], "word_embeddings", "LayerNorm", "classifier",
    ),
    "gpt2": Base(
        "GPT2LMHeadModel", "GPT2Config", GPT2, "CAUSAL_LM", ["c_attn"], ["c_attn", "mlp.c_proj"], ["mlp.c_proj"],
        "wte", "ln_1", "lm_head",
    ),
    "llama": Base(
        "LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 1}, "CAUSAL_LM", ["q_proj", "v_proj"],
        ["k_proj", "v_proj", "down_proj"], ["down_proj"], "embed_tokens", "input_layernorm", "lm_head",
        reference="sdpa",
    ),
}  # fmt: skip


def lora(base, **options):
    options.setdefault("target_modules", base.attention)
    return peft.LoraConfig(task_type=base.kind, r=2, fan_in_fan_out="c_attn" in options["target_modules"], **options)


def on_attention(kind, **options):
    return lambda base: getattr(peft, kind)(task_type=base.kind, target_modules=base.attention, **options)


def virtual_tokens(kind, **options):
    return lambda base: getattr(peft, kind)(task_type=base.kind, num_virtual_tokens=3, **options)


METHODS = {
    "LoRA": lora,
    "LoRA with biases": lambda base: lora(base, bias="lora_only"),
    "LoRA of embeddings": lambda base: lora(base, target_modules=[base.embedding]),
    "LoRA and a head": lambda base: lora(base, modules_to_save=[base.head]),
    "LoRA and a tied head": lambda base: lora(base, modules_to_save=[base.head], ensure_weight_tying=True),
    "LoRA, random steps": lambda base: lora(base, lora_dropout=0.3),
    "DoRA": lambda base: lora(base, use_dora=True),
    "DoRA, random steps": lambda base: lora(base, use_dora=True, lora_dropout=0.3),
    "rsLoRA": lambda base: lora(base, use_rslora=True),
    "IA3": lambda base: peft.IA3Config(
        task_type=base.kind,
        target_modules=base.scaled,
        feedforward_modules=base.feedforward,
        fan_in_fan_out=base.head == "lm_head" and "c_attn" in base.scaled,
    ),
    "prefix": virtual_tokens("PrefixTuningConfig"),
    "projected prefix": virtual_tokens("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=8),
    "prompt": virtual_tokens("PromptTuningConfig"),
    "P-tuning": virtual_tokens("PromptEncoderConfig", encoder_hidden_size=8),
    "P-tuning by LSTM": virtual_tokens(
        "PromptEncoderConfig", encoder_hidden_size=8, encoder_reparameterization_type="LSTM", encoder_dropout=0.0
    ),
    "AdaLoRA": on_attention("AdaLoraConfig", init_r=2, target_r=2, total_step=10),
    "VeRA": on_attention("VeraConfig", r=4),
    "HRA": on_attention("HRAConfig", r=2),
    "LoHa": on_attention("LoHaConfig", r=2),
    "LoKr": on_attention("LoKrConfig", r=2),
    "OFT": on_attention("OFTConfig", oft_block_size=4),
    "norms": lambda base: peft.LNTuningConfig(task_type=base.kind, target_modules=[base.norm]),
    "tokens": lambda base: peft.TrainableTokensConfig(
        task_type=base.kind, token_indices=[*range(3, 20)], target_modules=[base.embedding]
    ),
}
CASES = [
    *(("LoRA", name) for name in BASES),
    ("LoRA with biases", "bert"),
    ("LoRA of embeddings", "gpt2"),
    *(("LoRA and a head", name) for name in BASES),
    ("LoRA and a tied head", "gpt2"),
    *(("DoRA", name) for name in BASES),
    ("rsLoRA", "roberta"),
    *(("IA3", name) for name in ("bert", "gpt2", "llama")),
    *(("prefix", name) for name in ("bert", "gpt2", "llama")),
    ("projected prefix", "gpt2"),
    *(("prompt", name) for name in ("roberta", "gpt2", "llama")),
    ("P-tuning", "roberta"),
    ("AdaLoRA", "bert"),
    ("VeRA", "llama"),
    ("HRA", "roberta"),
    ("norms", "bert"),
    ("tokens", "bert"),
    ("tokens", "gpt2"),
]
# Torch has no batching rule (of the LSTM, of OFT's writing into a matrix, of torch.eye into one in AdaLoRA's own loss), or
# peft decides by the value of a random number (LoHa, LoKr): tasks run one after another.
LOOPS = [
    ("P-tuning by LSTM", "bert"),
    ("OFT", "llama"),
    ("AdaLoRA", "bert"),
    ("LoHa", "roberta"),
    ("LoKr", "bert"),
]


@pytest.fixture(autouse=True)
def registered():
    huggingface.register()
    with float64_throughout(), sdpa_kernel([SDPBackend.MATH]):
        yield


def adapted_base(method, name, generator):
    """The model of the plain loop, with other numbers in it than peft's first ones, of which many are 0."""
    base = BASES[name]
    model = getattr(transformers, base.model)(getattr(transformers, base.config)(**base.settings))
    model.set_attn_implementation(base.reference)
    model = peft.get_peft_model(model, METHODS[method](base)).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def twin(model):
    """The same model for the learner."""
    ours = copy.deepcopy(model)
    ours.get_base_model().set_attn_implementation(huggingface.NAME)
    return ours


def batch(name, generator, tasks=TASKS):
    """Ids of which some are padding, and labels of examples or of tokens."""
    ids = torch.randint(3, VOCABULARY, (tasks, EXAMPLES, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (tasks, EXAMPLES, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    if BASES[name].kind == "SEQ_CLS":
        labels = torch.randint(CLASSES, (tasks, EXAMPLES), generator=generator)
    else:
        labels = torch.randint(3, VOCABULARY, (tasks, EXAMPLES, LENGTH), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask, "labels": labels}


def loss_fn(net, batch):
    """Cross-entropy of one task over what is not padding."""
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    # Prompt tuning puts its virtual tokens before the others.
    losses = F.cross_entropy(logits[:, -LENGTH:].flatten(0, 1), labels.flatten(), reduction="none")
    weights = batch["attention_mask"].flatten()
    return (losses * weights).sum() / weights.sum()


def own_loss(net, batch):
    """The model's own: AdaLoRA adds how far its factors are from orthogonal ones."""
    return net(**batch).loss


def learner(model, loss=loss_fn, **options):
    return metafast.MAML(model, loss, inner=metafast.inner.SGD(lr=LR), steps=STEPS, **options)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def compare(model, batches, metas, loss=loss_fn, seed=None, order=2):
    """The learners' losses, meta-gradients and adapted parameters beside the plain loop's."""
    for support, query in batches:
        if seed is not None:
            torch.manual_seed(seed)
        losses = query_losses(model, loss, support, query, STEPS, LR, create_graph=order == 2)
        expected = gradients(losses.mean(), trained(model))
        assert max(g.abs().max() for g in expected) > 0
        for meta in metas:
            if seed is not None:
                torch.manual_seed(seed)
            found, grads = meta_gradients(meta, support, query, params=trained(meta.model))
            assert abs(found - losses.mean()) < TOLERANCE * losses.mean()
            assert distance(grads, expected) < TOLERANCE
            assert all(p.grad is None for p in meta.model.parameters() if not p.requires_grad)
        if seed is not None:
            continue
        plain = [
            adaptation(model, loss, task(support, index), STEPS, LR, create_graph=False)[-1]
            for index in range(len(support["labels"]))
        ]
        for meta in metas:
            params = meta.adapt(support).params
            for index, end in enumerate(plain):
                # All that is trained, and nothing of the base.
                assert params.keys() == end.keys()
                assert distance([params[name][index] for name in end], [p.detach() for p in end.values()]) < TOLERANCE


@pytest.mark.parametrize(("method", "name"), [*CASES[: len(BASES)], *some(CASES[len(BASES) :], 6)])
def test_methods(method, name, generator, monkeypatch, caplog):
    """Side by side, captured and not; the second call of a captured learner is a replay."""
    if (method, name) == ("tokens", "gpt2"):
        # Its embedding and its output are tied: peft registers one ParameterDict under both. functional_call leaves the
        # tensors that it was given behind in such a module, so it gets another copy each time.
        monkeypatch.setattr(
            plain_loop, "at", lambda model, params: lambda **b: functional_call(copy.deepcopy(model), params, (), b)
        )
    model = adapted_base(method, name, generator)
    metas = [learner(twin(model), capture=capture, task_batching="vmap") for capture in (False, True)]
    with caplog.at_level(logging.WARNING, logger="metafast"):
        compare(model, [(batch(name, generator), batch(name, generator)) for _ in range(2)], metas)
    assert not [record for record in caplog.records if record.name == "metafast"]


@pytest.mark.parametrize(("method", "name"), some(LOOPS, 2))
def test_methods_that_run_as_a_loop(method, name, generator, caplog):
    model = adapted_base(method, name, generator)
    # In training mode, LoHa and LoKr leave a layer out where a random number is below their module_dropout, even if it is 0.
    decides = method in ("LoHa", "LoKr")
    loss = own_loss if method == "AdaLoRA" else loss_fn
    compare(model, [(batch(name, generator), batch(name, generator))], [learner(twin(model), loss)], loss)
    assert "tasks run one after another, since the model does not run under vmap" in caplog.text
    # The attention is metafast's already.
    assert "attn_implementation" not in caplog.text
    if decides:
        with pytest.raises(NotRecordableError, match="depends on the values of tensors in Python"):
            learner(twin(model), capture=True)(batch(name, generator), batch(name, generator))
        model.eval()
    batches = [(batch(name, generator), batch(name, generator)) for _ in range(2)]
    compare(model, batches, [learner(twin(model), loss, capture=True)], loss)


@pytest.mark.parametrize(
    ("method", "name"), [*(("LoRA, random steps", name) for name in BASES), ("DoRA, random steps", "gpt2")]
)
def test_dropout(method, name, generator):
    """One task draws what the plain loop draws, from the same seed."""
    model = adapted_base(method, name, generator)
    options = [{"task_batching": "vmap"}, {"task_batching": "vmap", "capture": True}, {"checkpoint": True}]
    batches = [(batch(name, generator, 1), batch(name, generator, 1)) for _ in range(2)]
    compare(model, batches, [learner(twin(model), **o) for o in options], seed=generator.initial_seed() % 2**31)


def test_every_task_draws_its_own_dropout(generator):
    model = adapted_base("LoRA, random steps", "bert", generator)
    same = pytree.tree_map(lambda leaf: leaf.expand(TASKS, *leaf.shape[1:]), batch("bert", generator, 1))
    params = learner(twin(model), task_batching="vmap").adapt(same).params
    assert all(not torch.equal(*values) for name, values in params.items() if "lora_" in name)


@pytest.mark.parametrize(
    "options",
    [
        {"order": 1},
        {"checkpoint": True},
        {"task_batching": "loop"},
        {"tasks_per_chunk": 1},
        {"micro_batches": EXAMPLES},
        {"order": 1, "capture": True},
    ],
    ids=str,
)
def test_options(options, generator):
    model = adapted_base("LoRA and a head", "bert", generator)
    batches = [(batch("bert", generator), batch("bert", generator))]
    compare(model, batches, [learner(twin(model), **options)], order=options.get("order", 2))


@pytest.mark.parametrize("capture", [False, True])
def test_the_base_is_meta_trained_where_it_is_not_frozen(capture, generator):
    """Adapters alone are adapted; the base gets its exact meta-gradient."""
    model = adapted_base("LoRA", "bert", generator).requires_grad_()
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    meta = learner(twin(model), adapt_parameters=["*.lora_A.*", "*.lora_B.*"], capture=capture)
    for _ in range(2):
        batches = batch("bert", generator), batch("bert", generator)
        losses = query_losses(model, loss_fn, *batches, STEPS, LR, names=names)
        expected = gradients(losses.mean(), trained(model))
        loss, found = meta_gradients(meta, *batches)
        assert abs(loss - losses.mean()) < TOLERANCE
        assert distance(found, expected) < TOLERANCE
    assert set(meta.adapt(batches[0]).params) == set(names)


class Made(TorchDispatchMode):
    """Names of the operations that make a tensor of the shape of a weight of the base, for all tasks or for one.

    Views of the base do not count.

    Args:
        weights: the base's.
    """

    def __init__(self, weights):
        super().__init__()
        self._own = {p.untyped_storage().data_ptr() for p in weights}
        sizes = {tuple(p.shape) for p in weights} | {tuple(p.shape[::-1]) for p in weights}
        self._sizes = sizes | {(TASKS, *size) for size in sizes}
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and tuple(leaf.shape) in self._sizes:
                # Under vmap, what is inside of the wrapper comes by here too.
                if torch._C._functorch.is_functorch_wrapped_tensor(leaf):
                    continue
                if leaf.untyped_storage().data_ptr() not in self._own:
                    self.found.append(str(func))
        return result


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_the_base_is_neither_copied_nor_differentiated(name, capture, generator):
    def made(frozen):
        model = twin(adapted_base("LoRA", name, generator))
        weights = [p for key, p in model.named_parameters() if "lora_" not in key and p.ndim == 2 and min(p.shape) > 3]
        for key, p in model.named_parameters():
            p.requires_grad_(not frozen or "lora_" in key)
        meta = learner(model, capture=capture)
        batches = batch(name, generator), batch(name, generator)
        # The first calls look whether they leave the model as it was, and record.
        meta(*batches), meta.adapt(batches[0])
        watch = Made(weights)
        with watch:
            meta(*batches).backward()
            learners = meta.adapt(batches[0])
            inputs = {key: value for key, value in batches[1].items() if key != "labels"}
            learners(**inputs)
        assert all(p.requires_grad or p.grad is None for p in model.parameters())
        return Counter(watch.found)

    assert made(frozen=True) == {}
    if name == "gpt2":
        # It would be seen.
        assert made(frozen=False)


@pytest.mark.parametrize("name", BASES)
def test_adapted_models(name, generator):
    """Outputs of all learners, and one as a model of peft: merged, saved, and used for text."""
    model = adapted_base("LoRA", name, generator).eval()
    learners = learner(twin(model)).adapt(batch(name, generator))
    query = {key: value for key, value in batch(name, generator).items() if key != "labels"}
    # A decoder's cache of keys and values has no task dimension; it is switched off through peft's model as well.
    logits = learners(**query).logits
    for index in range(TASKS):
        one = learners.model(index)
        assert isinstance(one, peft.PeftModel)
        merged = one.merge_and_unload()
        torch.testing.assert_close(merged(**task(query, index)).logits, logits[index], rtol=1e-9, atol=1e-11)
    if BASES[name].kind == "CAUSAL_LM":
        prompt = {key: value[:1, :3] for key, value in task(query, 0).items()}
        written = learners.model(0).generate(**prompt, max_new_tokens=2, do_sample=False)
        assert written.shape == (1, 5)


def test_adapters_are_saved_and_loaded(tmp_path, generator):
    """One task's adapter, without the base."""
    model = adapted_base("LoRA", "bert", generator).eval()
    base = copy.deepcopy(model).unload()
    learners = learner(twin(model)).adapt(batch("bert", generator))
    learners.model(1).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    query = {key: value for key, value in batch("bert", generator).items() if key != "labels"}
    expected = learners(**query).logits[1]
    torch.testing.assert_close(loaded(**task(query, 1)).logits, expected, rtol=1e-9, atol=1e-11)


def test_a_prefix_of_a_decoder_comes_back_in_its_cache(generator):
    """Llama gives back the cache that it was given, whatever use_cache says: refused for all learners, served for one."""
    model = adapted_base("prefix", "llama", generator).eval()
    learners = learner(twin(model)).adapt(batch("llama", generator))
    query = {key: value for key, value in batch("llama", generator).items() if key != "labels"}
    with pytest.raises(TypeError, match=r"got a DynamicCache .* or call learners\.model\(task\)"):
        learners(**query)
    assert learners.model(0)(**task(query, 0)).logits.isfinite().all()
