"""Models that are hard on other libraries' calls: shared parameters, a recurrence, buffers."""

from __future__ import annotations

import torch
from torch import nn


class Tied(nn.Module):
    """Shares a parameter, and calls attention."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        hidden = torch.tanh(self.first(x)).unsqueeze(0)
        attended, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        return self.second(torch.tanh(attended.squeeze(0)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
