"""Meta-SGD's table 1 (Li, Zhou, Chen and Li, arXiv 1707.09835): few-shot regression of sine curves, 5-shot meta-training.

    python examples/sinusoid.py

Curves y = A sin(ω x + b) with A from [0.1, 5], ω from [0.8, 1.2], b from [0, π] and x from [−5, 5], all uniform; an MLP
1-40-40-1 with ReLU; one inner step, of rate 0.01 for MAML and of learned rates that start uniform in [0.005, 0.1] for
Meta-SGD; 60 000 iterations with Adam. Then 100 new curves: one step on k examples, mean squared error on as many others. The
table has the paper's mean ± 95 % interval beside ours.

All tasks of an iteration run side by side, and so do the 100 test curves; an iteration is captured once and replayed: two to
three minutes for each algorithm on one CPU core. ``--iterations`` makes it shorter.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast
from metafast.algorithms.learner import MetaLearner

SHOTS = (5, 10, 20)
PAPER = {
    "MAML": {5: (1.13, 0.18), 10: (0.85, 0.14), 20: (0.71, 0.12)},
    "Meta-SGD": {5: (0.90, 0.16), 10: (0.63, 0.12), 20: (0.50, 0.10)},
}


def curves(tasks: int, points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points ``[tasks, points, 1]`` of new curves, x and y."""

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator)

    amplitude, frequency, phase = (
        uniform(low, high, tasks, 1, 1) for low, high in ((0.1, 5.0), (0.8, 1.2), (0.0, math.pi))
    )
    x = uniform(-5.0, 5.0, tasks, points, 1)
    return x, amplitude * torch.sin(frequency * x + phase)


def episode(tasks: int, shots: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Support and query of as many points each, of the same curves."""
    points = curves(tasks, 2 * shots, generator)
    return tuple(p[:, :shots] for p in points), tuple(p[:, shots:] for p in points)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(model(batch[0]), batch[1])


def network() -> nn.Module:
    """The MLP of the paper."""
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def learner(algorithm: str) -> MetaLearner:
    """MAML or Meta-SGD as the paper starts them."""
    sgd = metafast.inner.SGD(lr=0.01)
    if algorithm == "MAML":
        return metafast.MAML(network(), loss_fn, inner=sgd, capture=True)
    meta = metafast.MetaSGD(network(), loss_fn, inner=sgd, capture=True)
    for alpha in meta.rates.parameters():
        nn.init.uniform_(alpha, 0.005, 0.1)
    return meta


def train(meta: MetaLearner, iterations: int, tasks: int, lr: float, generator: torch.Generator) -> None:
    """Meta-trains on 5-shot tasks."""
    optimizer = torch.optim.Adam(meta.parameters(), lr, fused=True)
    for _ in range(iterations):
        support, query = episode(tasks, 5, generator)
        optimizer.zero_grad()
        meta(support, query).backward()
        optimizer.step()


def evaluate(meta: MetaLearner, shots: int, generator: torch.Generator, count: int = 100) -> tuple[float, float]:
    """Mean squared error after adaptation on ``count`` new curves: mean, and half of its 95 % interval."""
    support, (x, y) = episode(count, shots, generator)
    errors = (meta.adapt(support)(x) - y).square().mean((1, 2))
    return errors.mean().item(), 1.96 * errors.std().item() / math.sqrt(count)


def main() -> None:
    """Trains both, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60_000)
    parser.add_argument("--tasks", type=int, default=4, help="of an iteration; the paper does not say")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam outside")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    print(f"{'':<10}{'shots':>6}{'paper':>16}{'ours':>16}")
    for algorithm, paper in PAPER.items():
        torch.manual_seed(options.seed)
        meta = learner(algorithm)
        started = time.perf_counter()
        train(meta, options.iterations, options.tasks, options.lr, torch.Generator().manual_seed(options.seed))
        seconds = time.perf_counter() - started
        for shots in SHOTS:
            mean, half = evaluate(meta, shots, torch.Generator().manual_seed(options.seed + 1))
            theirs = "{:.2f} ± {:.2f}".format(*paper[shots])
            print(f"{algorithm:<10}{shots:>6}{theirs:>16}{f'{mean:.2f} ± {half:.2f}':>16}")
        print(f"{algorithm}: {options.iterations} iterations in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
