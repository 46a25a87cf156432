"""Decoder and encoder–decoder: caches, padding, beams, copies, and meta-gradients through them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from plain_loop import distance, gradients, meta_gradients, query_losses
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.inner import SGD
from metafast.models import Decoder, EncoderDecoder
from metafast.training import language_model_loss, translation_loss

VOCABULARY, END = 9, 3


@pytest.fixture
def decoder(generator):
    return Decoder(vocabulary=VOCABULARY, width=16, layers=2, heads=2, max_length=14, end=END).double()


@pytest.fixture(params=[True, False], ids=["copies", "writes"])
def translator(request, generator):
    return EncoderDecoder(
        vocabulary=VOCABULARY, width=16, layers=2, heads=2, max_length=8, copies=request.param, end=END
    ).double()


def words(generator, *shape):
    return torch.randint(4, VOCABULARY, shape, generator=generator)


def test_no_position_sees_later_ones(decoder, generator):
    ids = words(generator, 3, 6)
    assert torch.allclose(decoder(ids)[:, :4], decoder(ids[:, :4]), rtol=0, atol=1e-12)


def test_padding_changes_nothing(decoder, generator):
    ids = words(generator, 3, 6)
    expected = decoder(ids)
    for before, after in ((2, 0), (0, 3)):
        mask = F.pad(torch.ones_like(ids), (before, after))
        found = decoder(F.pad(ids, (before, after)), mask)[:, before : before + 6]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_greedy_generation_takes_the_best_id_each_time(decoder, generator):
    ids = words(generator, 4, 5)
    mask = (torch.arange(5) >= torch.tensor([[0], [1], [2], [4]])).long()
    found = decoder.generate(ids, mask, max_new_tokens=7)
    for row, real in enumerate(mask):
        text = ids[row, real.bool()][None]
        for _ in range(7):
            text = torch.cat((text, decoder(text)[:, -1:].argmax(-1)), 1)
            if text[0, -1] == END:
                break
        new = text[0, int(real.sum()) :]
        assert found[row, 5 : 5 + len(new)].tolist() == new.tolist()
        assert not found[row, 5 + len(new) :].any()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_that_hold_everything_find_the_best(translator, generator, length_penalty):
    source = F.pad(words(generator, 2, 5), (0, 1))
    found = translator.generate(source, max_new_tokens=3, num_beams=VOCABULARY**3, length_penalty=length_penalty)
    every = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=3)))
    ended = (every == END).cumsum(1) - (every == END).long() > 0
    lengths = (~ended).sum(1)
    for row in range(2):
        of_each = translator(source[row].expand(len(every), -1), None, every).log_softmax(-1)
        of_each = of_each.gather(2, every[..., None])[..., 0].masked_fill(ended, 0.0)
        best = (of_each.sum(1) / lengths**length_penalty).argmax()
        labels = every[best, : lengths[best]].tolist()
        assert found[row].tolist() == [2, *labels, *[0] * (found.shape[1] - 1 - len(labels))]


def test_more_beams_are_not_worse(translator, generator):
    source = words(generator, 3, 6)

    def score(labels):
        # A model that has learned nothing writes the id of padding, too: what follows an end is padding.
        ends = labels == END
        labels = labels.masked_fill(ends.cumsum(1) - ends.long() > 0, -100)
        return -F.cross_entropy(translator(source, None, labels).transpose(1, 2), labels, reduction="none").sum(1)

    one, four = (translator.generate(source, num_beams=n, length_penalty=0.0)[:, 1:] for n in (1, VOCABULARY**2))
    assert (score(four) >= score(one) - 1e-9).all()


def test_source_padding_changes_nothing(translator, generator):
    source, labels = words(generator, 3, 5), words(generator, 3, 4)
    padded = F.pad(source, (0, 2))
    expected = translator(source, None, labels)
    torch.testing.assert_close(translator(padded, None, labels), expected, rtol=1e-12, atol=1e-12)
    labels = F.pad(labels, (0, 2), value=-100)
    torch.testing.assert_close(translator(padded, padded != 0, labels)[:, :4], expected, rtol=1e-12, atol=1e-12)


def test_copies_are_a_share_of_the_distribution(generator):
    """Beside See et al., equation 9, where an id of the source is there twice, and padded."""
    model = EncoderDecoder(vocabulary=VOCABULARY, width=16, layers=1, heads=2, max_length=8).double()
    parts = {}
    for name in ("head", "copy_gate", "copy_query", "copy_key"):
        getattr(model, name).register_forward_hook(lambda _, __, output, name=name: parts.update({name: output}))
    source = torch.tensor([[4, 5, 5, 0], [6, 4, 8, 6]])
    labels = words(generator, 2, 3)
    found = model(source, None, labels).softmax(-1)
    inputs = torch.cat((torch.full((2, 1), 2), labels[:, :-1]), 1)
    before = torch.cat((torch.full((2, 1), 2), source[:, :-1]), 1)
    scores = parts["copy_query"] @ parts["copy_key"].mT / 4 + 4 * (inputs[:, :, None] == before[:, None, :])
    scores -= model.copy_distance * (torch.arange(3)[:, None] - torch.arange(4)).abs()
    weights = scores.masked_fill((source == 0)[:, None, :], -torch.inf).softmax(-1)
    copied = weights @ F.one_hot(source, VOCABULARY).double()
    share = parts["copy_gate"].sigmoid()
    expected = (1 - share) * parts["head"].softmax(-1) + share * copied
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_what_follows_in_the_source_is_copied(generator):
    model = EncoderDecoder(vocabulary=VOCABULARY, width=16, layers=1, heads=2, max_length=8, end=END)
    with torch.no_grad():
        model.copy_gate.bias.fill_(30.0)
        model.copy_following.fill_(30.0)
    source = torch.tensor([[4, 8, 6, 5, END, 0], [7, 5, END, 0, 0, 0]])
    assert model.generate(source).tolist() == [[2, 4, 8, 6, 5, END], [2, 7, 5, END, 0, 0]]


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(
    ("kind", "loss_fn", "target"), [(Decoder, language_model_loss, 6), (EncoderDecoder, translation_loss, 5)]
)
def test_meta_gradients(kind, loss_fn, target, capture, generator):
    model = kind(vocabulary=VOCABULARY, width=8, layers=1, heads=2, max_length=8).double()
    support, query = (
        {
            "input_ids": words(generator, 3, 4, 6),
            "attention_mask": (torch.arange(6) < torch.randint(3, 7, (3, 4, 1), generator=generator)).long(),
            "labels": words(generator, 3, 4, target).masked_fill(torch.arange(target) > 3, -100),
        }
        for _ in range(2)
    )
    meta = metafast.MAML(model, loss_fn, inner=SGD(lr=0.3), steps=2, capture=capture)
    loss, found = meta_gradients(meta, support, query)
    with sdpa_kernel(SDPBackend.MATH):
        expected = query_losses(model, loss_fn, support, query, 2, 0.3).mean()
        gradient = gradients(expected, model.parameters())
    assert abs(loss - expected) < 1e-9
    assert distance(found, gradient) < 1e-8
