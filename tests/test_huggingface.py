"""Hugging Face models with attn_implementation="metafast" against their own attention, in float64."""

from __future__ import annotations

import plain_loop
import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.testing import relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from metafast.integrations import huggingface  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("fused_cpu"),
    # Transformers' own deprecations are not ours to fix.
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers"),
]

SMALL = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 30}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 2,
    "vocab_size": 30,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, **NO_DROPOUT)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SMALL, **NO_DROPOUT, pad_token_id=1)),
    "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)),
    "gpt2, scaled by layer": lambda: transformers.GPT2Model(
        transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)
    ),
    "llama, grouped heads": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "bart": lambda: transformers.BartModel(
        transformers.BartConfig(
            vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0, max_position_embeddings=20,
        )
    ),
    "t5": lambda: transformers.T5Model(
        transformers.T5Config(
            vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def registered():
    huggingface.register()


# Their eager softmax is float32, whatever the model is: compared with torch's dense attention instead.
FLOAT32_SOFTMAX = ("llama, grouped heads", "t5")


@pytest.fixture(params=MODELS)
def pair(request, generator):
    """The same model with its own attention and with ours."""
    theirs = MODELS[request.param]().double().eval()
    ours = MODELS[request.param]().double().eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.set_attn_implementation("sdpa" if request.param in FLOAT32_SOFTMAX else "eager")
    ours.set_attn_implementation("metafast")
    with sdpa_kernel(SDPBackend.MATH):
        yield theirs, ours


def loss(model, params, ids, padding):
    inputs = {"input_ids": ids, "attention_mask": padding}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(-1)
    out = functional_call(model, params, (), inputs).last_hidden_state
    # What stands at padding is nobody's business: eager's finite minimum and an exact mask differ there.
    weights = padding if padding is not None and not model.config.is_encoder_decoder else torch.ones_like(ids)
    return (out * weights.unsqueeze(-1)).pow(2).sum()


def batch(generator, *shape, padded):
    ids = torch.randint(2, 30, (*shape, 7), generator=generator)
    if not padded:
        return ids, None
    return ids, (torch.arange(7) < torch.randint(3, 8, (*shape, 1), generator=generator)).long()


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def close(found, expected, names):
    scale = max(value.abs().max() for value in expected.values())
    for name in names:
        error = relative_error(found[name], expected[name])
        assert error < 1e-9 or (found[name] - expected[name]).abs().max() < 1e-12 * scale, name


@pytest.mark.parametrize("padded", [False, True])
def test_first_and_second_order(pair, padded, generator):
    ids, padding = batch(generator, 3, padded=padded)
    results = []
    for model in pair:
        params = {name: p.requires_grad_() for name, p in trained(model).items()}
        first = torch.autograd.grad(
            loss(model, params, ids, padding),
            params.values(),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        norm = sum(g.pow(2).sum() for g in first)
        second = torch.autograd.grad(norm, params.values(), allow_unused=True, materialize_grads=True)
        results.append([dict(zip(params, grads, strict=True)) for grads in (first, second)])
    for expected, found in zip(*results, strict=True):
        close(found, expected, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_under_vmap_over_tasks(pair, padded, generator):
    theirs, ours = pair
    ids, padding = batch(generator, 2, 3, padded=padded)
    params = trained(ours)

    def gradient(ids, padding):
        return grad(lambda p: loss(ours, p, ids, padding))(params)

    found = vmap(gradient, (0, None if padding is None else 0))(ids, padding)
    for t in range(2):
        mask = None if padding is None else padding[t]
        expected = grad(lambda p, ids=ids[t], mask=mask: loss(theirs, p, ids, mask))(trained(theirs))
        close({name: value[t] for name, value in found.items()}, expected, expected)


def test_maml_over_a_hugging_face_model(generator):
    model = MODELS["bert"]().double()
    model.set_attn_implementation("metafast")

    def loss_fn(net, b):
        return net(input_ids=b[0], attention_mask=b[1]).last_hidden_state.pow(2).mean()

    support, query = (batch(generator, 2, n, padded=True) for n in (3, 4))
    meta = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.1), steps=2, task_batching="vmap")
    assert metafast.check(meta, support, query, rounds=1).error < 1e-9


def test_dropout_in_training(generator):
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    model = transformers.BertModel(config).train()
    model.set_attn_implementation("metafast")
    ids, padding = batch(generator, 2, padded=True)
    first, again = (model(input_ids=ids, attention_mask=padding).last_hidden_state for _ in "12")
    assert not torch.equal(first, again)


def test_what_is_not_supported_says_so():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="softcap: not supported"):
        huggingface.attention(torch.nn.Identity(), q, q, q, None, softcap=30.0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama, grouped heads", "bart"])
def test_attention_weights_are_not_given_in_silence(name, caplog, generator):
    from transformers.utils import logging

    model = MODELS[name]().eval()
    model.set_attn_implementation("metafast")
    ids, _ = batch(generator, 2, padded=False)
    caplog.clear()
    logger = logging.get_logger("transformers.integrations.metafast")
    logging.warning_once.cache_clear()  # once a process
    logger.addHandler(caplog.handler)
    try:
        model(ids)
        assert not caplog.records
        for _ in range(2):
            model(ids, output_attentions=True)
    finally:
        logger.removeHandler(caplog.handler)
    record = caplog.records[0]
    assert all(other is record for other in caplog.records)  # it comes twice where transformers' log propagates
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        "output_attentions=True: the attention implementation 'metafast' computes no attention weights, and gives none; "
    )


def test_falcon_with_one_head_of_keys_under_maml(generator):
    """By its own sdpa, which leaves the broadcasting to torch's attention."""
    config = transformers.FalconConfig(
        hidden_size=16, num_attention_heads=4, num_hidden_layers=2, ffn_hidden_size=24, vocab_size=30,
        multi_query=True, new_decoder_architecture=False, hidden_dropout=0.0, attention_dropout=0.0, use_cache=False,
    )  # fmt: skip
    model = transformers.FalconModel(config).double()
    model.set_attn_implementation("sdpa")

    def loss_fn(net, ids):
        return net(ids).last_hidden_state.pow(3).mean()

    support, query = (torch.randint(0, 30, (2, n, 7), generator=generator) for n in (3, 2))
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain_loop.query_losses(model, loss_fn, support, query, 2, 0.1).mean()
        gradients = plain_loop.gradients(expected, model.parameters())
    for batching in ("auto", "loop"):
        meta = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.1), steps=2, task_batching=batching)
        loss, found = plain_loop.meta_gradients(meta, support, query)
        assert relative_error(loss, expected) < 1e-12
        assert plain_loop.distance(found, gradients) < 1e-9
