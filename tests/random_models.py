"""Small random models out of torch's modules, with the traits that real ones have, and what they are trained on."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

TASKS, LENGTH, WIDTH, WORDS, WAYS = 3, 3, 4, 13, 3


class Norm(nn.Module):
    """A norm of channels, ``[n, channels, length]``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return x + self.rnn(x)[0]


class Attention(nn.Module):
    def __init__(self, causal: bool, weights: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
        self.causal, self.weights = causal, weights

    def forward(self, x):
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if self.causal else None
        return x + self.attention(x, x, x, attn_mask=mask, need_weights=self.weights)[0]


class Encoder(nn.Module):
    """With a padding mask that depends on the values, and leaves the first place."""

    def __init__(self, causal: bool, padded: bool, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True, **options)
        self.causal, self.padded = causal, padded

    def forward(self, x):
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if self.causal else None
        padding = (x[..., 0] < -0.5) & (torch.arange(LENGTH) > 0) if self.padded else None
        return self.layer(x, mask, padding, is_causal=self.causal and not self.padded)


class Decoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True, **options)

    def forward(self, x):
        return self.layer(x, x[:, :2] * 0.5)


class Cached(nn.Module):
    """A mask that is made at the first call and kept as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = None
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if self.mask is None or self.mask.shape[-1] != x.shape[-2]:
            self.mask = x.new_ones(x.shape[-2], x.shape[-2]).tril()
        return torch.tanh(self.linear(self.mask @ x))


class Buffered(nn.Module):
    """A buffer that each call reads, and in training one that it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.rand(WIDTH) + 0.5)
        self.register_buffer("table", torch.randn(LENGTH, WIDTH), persistent=False)

    def forward(self, x):
        return x * self.factor + self.table


class Net(nn.Module):
    """Ids or vectors ``[n, length(, width)]`` in, ``[n, classes]`` or ``[n, width]`` out."""

    def __init__(self, start: nn.Module, blocks: list[nn.Module], twice: bool, head: nn.Module) -> None:
        super().__init__()
        self.start = start
        self.blocks = nn.ModuleList(blocks)
        self.twice = twice
        self.head = head

    def forward(self, x):
        x = self.start(x)
        for block in self.blocks:
            x = block(x)
            if self.twice:
                x = block(x)
        return self.head(x.mean(1))


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "embedding": {},
    "embedding, padded": {"padding_idx": 0},
    "embedding, by frequency": {"scale_grad_by_freq": True},
    "embedding, by frequency, padded": {"padding_idx": 2, "scale_grad_by_freq": True},
    "embedding, bounded": {"max_norm": 1.0},
    "vectors": {},
}

BLOCKS = {
    "linear": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "LayerNorm without bias": lambda: nn.LayerNorm((LENGTH, WIDTH), bias=False),
    "LayerNorm not affine": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "RMSNorm not affine": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False, eps=1e-6),
    "GroupNorm": lambda: Norm(nn.GroupNorm(2, WIDTH)),
    "GroupNorm not affine": lambda: Norm(nn.GroupNorm(1, WIDTH, affine=False)),
    "BatchNorm": lambda: Norm(nn.BatchNorm1d(WIDTH)),
    "BatchNorm averaging all": lambda: Norm(nn.BatchNorm1d(WIDTH, momentum=None)),
    "BatchNorm not affine": lambda: Norm(nn.BatchNorm1d(WIDTH, affine=False)),
    "BatchNorm without statistics": lambda: Norm(nn.BatchNorm1d(WIDTH, track_running_stats=False)),
    "InstanceNorm": lambda: Norm(nn.InstanceNorm1d(WIDTH)),
    "InstanceNorm with statistics": lambda: Norm(nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True)),
    "Conv1d in groups": lambda: Norm(nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2), nn.GELU())),
    "Conv1d by depth": lambda: Norm(nn.Conv1d(WIDTH, WIDTH, 3, padding="same", groups=4, padding_mode="circular")),
    "RNN": lambda: Recurrent(nn.RNN(WIDTH, WIDTH, batch_first=True)),
    "GRU": lambda: Recurrent(nn.GRU(WIDTH, 2, batch_first=True, bidirectional=True)),
    "LSTM": lambda: Recurrent(nn.LSTM(WIDTH, 5, proj_size=4, batch_first=True)),
    "attention": lambda: Attention(False, True),
    "attention, causal": lambda: Attention(True, False, bias=False),
    "attention, biased": lambda: Attention(False, False, add_bias_kv=True, add_zero_attn=True),
    "encoder": lambda: Encoder(False, False),
    "encoder, padded": lambda: Encoder(False, True, norm_first=True, activation="gelu"),
    "encoder, causal": lambda: Encoder(True, False, bias=False),
    "encoder, causal and padded": lambda: Encoder(True, True),
    "decoder": lambda: Decoder(),
    "decoder, norm first": lambda: Decoder(norm_first=True),
    "cached": Cached,
    "buffered": Buffered,
}


@st.composite
def models(draw: st.DrawFn, embedding: bool = False) -> tuple[Net, str]:
    """A model, and what its inputs are: "ids" or "vectors".

    Args:
        embedding: the model is to give embeddings, for prototypes.
    """
    start = draw(st.sampled_from(list(EMBEDDINGS)))
    names = draw(st.lists(st.sampled_from(list(BLOCKS)), min_size=0, max_size=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = [BLOCKS[name]() for name in names]
    ids = start != "vectors"
    first = nn.Embedding(WORDS, WIDTH, **EMBEDDINGS[start]) if ids else nn.Linear(WIDTH, WIDTH)
    tied = ids and not embedding and draw(st.booleans())
    head = nn.Linear(WIDTH, WIDTH if embedding else WORDS if tied else WAYS)
    if tied:
        head.weight = first.weight
    model = Net(first, blocks, draw(st.booleans()), head).double().train(draw(st.booleans()))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    if draw(st.booleans()):
        frozen = draw(st.sampled_from([name for name, _ in model.named_parameters() if not name.startswith("head")]))
        model.get_parameter(frozen).requires_grad_(False)
    return model, "ids" if ids else "vectors"


def batch(kind: str, examples: int, ignored: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels, another number of which is ignored in every task, never all."""
    shape = TASKS, examples, LENGTH
    x = torch.randint(WORDS, shape) if kind == "ids" else torch.randn(*shape, WIDTH, dtype=torch.float64)
    labels = torch.randint(WAYS, shape[:2])
    if ignored:
        labels[torch.rand(shape[:2]) < 0.4] = -100
        # With one example a micro-batch none may be ignored, torch's mean of none being NaN.
        labels[:, 0] = 1
    return x, labels


class Loss:
    """Cross-entropy of one kind."""

    def __init__(self, smoothing: float, weighted: bool) -> None:
        self.options = {"label_smoothing": smoothing}
        self.weighted = weighted

    def __call__(self, model, batch):
        x, labels = batch
        logits = model(x)
        weight = torch.linspace(0.0, 1.0, logits.shape[-1], dtype=logits.dtype) if self.weighted else None
        return F.cross_entropy(logits, labels, weight, **self.options)

    def __repr__(self) -> str:
        return f"cross-entropy({self.options}, weighted={self.weighted})"
