"""The classifier of the demo."""

from __future__ import annotations

import pytest
import torch

from metafast.models import EncoderClassifier


def test_padding_changes_nothing(generator):
    model = EncoderClassifier(3, width=8, heads=2, max_length=12).double()
    text = torch.randint(1, 256, (4, 7), generator=generator)
    padded = torch.nn.functional.pad(text, (0, 5))
    torch.testing.assert_close(model(padded), model(text), rtol=1e-12, atol=1e-12)


def test_nothing_but_padding_is_finite():
    model = EncoderClassifier(3, width=8, heads=2, max_length=4)
    logits = model(torch.zeros(2, 4, dtype=torch.int64))
    assert torch.equal(logits, model.head.bias.expand(2, 3))


def test_order_matters(generator):
    model = EncoderClassifier(3, width=8, heads=2, max_length=4)
    assert not torch.allclose(model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[3, 2, 1]])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "classes: expected a positive number, got 0"),
        ({"classes": 2, "width": 10, "heads": 4}, "width: expected a multiple of heads = 4, got 10"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        EncoderClassifier(**arguments)


@pytest.mark.parametrize("shape", [(3,), (2, 9)])
def test_bad_text(shape):
    with pytest.raises(ValueError, match=r"text: expected \[n, length\] with length <= 8"):
        EncoderClassifier(2, width=8, heads=2, max_length=8)(torch.ones(shape, dtype=torch.int64))
