"""The setting of MixFlow-MG (Kemaev et al. 2025, arXiv:2505.00793) on two cores: MAML of a language model with inner Adam.

The model is after Chinchilla. Theirs has at least 57 million parameters, 2 to 8 inner steps on fresh batches of 2 to 8
sequences of 2048 to 8192 tokens, and one inner loop. A step's memory is that of its parameters and of its tokens: "long" has
four times the tokens of "short".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
# Under the square root, as optax advises for meta-gradients: where a gradient is nearly 0, the derivative is bounded.
EPS_ROOT = 1e-8
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Setting:
    name: str
    width: int
    layers: int
    length: int
    sequences: int
    steps: int
    heads: int = 4
    vocabulary: int = 1024
    rounds: int = 3


SETTINGS = {
    setting.name: setting
    for setting in [
        # For the small step that comes before memory is measured.
        Setting("tiny", 32, 2, 16, 2, 2, heads=2, vocabulary=64, rounds=5),
        Setting("short", 256, 4, 128, 4, 8),
        Setting("long", 256, 4, 512, 4, 4),
        Setting("wide", 384, 6, 256, 4, 4),
    ]
}


def rotations(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, size / 2]`` of rotary position embeddings (Su et al., arXiv:2104.09864)."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_network = nn.RMSNorm(width, eps=NORM_EPS)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotated(query, cosines, sines), rotated(key, cosines, sines)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_network(x)), approximate="tanh"))


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


class LanguageModel(nn.Module):
    """Causal, pre-norm, without biases; the embedding is also the head's matrix."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.tokens = nn.Embedding(setting.vocabulary, setting.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(setting.width, setting.heads) for _ in range(setting.layers))
        self.norm = nn.RMSNorm(setting.width, eps=NORM_EPS)
        cosines, sines = rotations(setting.length, setting.width // setting.heads)
        self.register_buffer("cosines", cosines)
        self.register_buffer("sines", sines)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text)
        for layer in self.layers:
            x = layer(x, self.cosines, self.sines)
        return F.linear(self.norm(x), self.tokens.weight)


def loss_fn(model: nn.Module, text: Tensor) -> Tensor:
    """Of the next token; ``text`` ``[n, length + 1]``."""
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def draw(setting: Setting) -> tuple[LanguageModel, Tensor, Tensor]:
    """The model, a batch for each inner step ``[steps, n, length + 1]`` and the outer batch ``[n, length + 1]``."""
    torch.manual_seed(0)
    model = LanguageModel(setting)
    # Not uniform, as text is not: half of the tokens are drawn from a sixteenth of the vocabulary.
    shape = (setting.steps + 1, setting.sequences, setting.length + 1)
    often = torch.randint(0, setting.vocabulary // 16, shape)
    text = torch.where(torch.rand(shape) < 0.5, often, torch.randint(0, setting.vocabulary, shape))
    return model, text[:-1], text[-1]
