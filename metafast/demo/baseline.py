"""The baseline without meta-learning: training on all training languages jointly, then fine-tuning with a new head."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from metafast.demo.config import Config
from metafast.demo.data import Names
from metafast.demo.evaluation import STEPS, accuracy_after
from metafast.tasks.text import encode

BATCH = 128
LEARNING_RATE = 1e-3
# Of fine-tuning; chosen on validation languages, for each number of steps apart.
FINE_TUNING_RATES = (0.02, 0.05, 0.1, 0.2)


def pretrain(config: Config, names: Names, seconds: float, quiet: bool = False) -> nn.Module:
    """The demo's network with a class for each training language, trained for ``seconds`` by cross-entropy.

    Returns:
        the network with a new head of ``config.ways`` classes.
    """
    from tqdm import tqdm

    model = config.model(classes=len(names))
    texts = torch.cat([encode(of_language, config.max_length) for of_language in names.values()]).long()
    labels = torch.cat([torch.full((len(of),), index) for index, of in enumerate(names.values())])
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    generator = torch.Generator().manual_seed(config.seed)
    start = last = time.perf_counter()
    with tqdm(total=round(seconds), desc="baseline", unit="s", disable=quiet, ncols=100) as bar:
        while last - start < seconds:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (last - start) / seconds))
            chosen = torch.randint(len(texts), (BATCH,), generator=generator)
            logits = model(texts[chosen])
            loss = F.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            now = time.perf_counter()
            bar.set_postfix(
                loss=f"{loss.item():.3f}",
                accuracy=f"{(logits.argmax(-1) == labels[chosen]).double().mean().item():.2f}",
                refresh=False,
            )
            bar.update(round(now - start) - bar.n)
            last = now
    return with_new_head(config, model)


def with_new_head(config: Config, model: nn.Module) -> nn.Module:
    """The body of ``model`` under a head of ``config.ways`` classes that prefers none."""
    fresh = config.model()
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    fresh.load_state_dict({**fresh.state_dict(), **body})
    return fresh


def search_learning_rates(model: nn.Module, config: Config, names: Names, episodes: int, seed: int) -> dict[int, float]:
    """The fine-tuning rate that is best on ``names``, for each number of steps."""
    found = {
        lr: accuracy_after(model, dict.fromkeys(STEPS, lr), config, names, episodes, seed) for lr in FINE_TUNING_RATES
    }
    return {steps: max(FINE_TUNING_RATES, key=lambda lr: found[lr][steps].mean) for steps in STEPS}
