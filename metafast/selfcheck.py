"""``python -m metafast check``: the fused path on this machine against the reference in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from metafast import inner
from metafast.algorithms import MAML
from metafast.checking import check
from metafast.models import EncoderClassifier
from metafast.ops.attention import scaled_dot_product_attention
from metafast.testing import ATTENTION_CASES, AttentionCase, relative_error, second_order

# Of a float32 meta-gradient: see the README's table. More says that a kernel is wrong here.
MOST_META_ERROR = 1e-4


def run() -> int:
    """Prints the errors of attention, case by case, and of a meta-gradient; 1 where one is too large."""
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"attention, float32 on {device}: largest relative error of 8 outputs, values to second order")
    print(f"{'case':<26}{'fused':>10}{'eager':>10}")
    failed = [case.name for case in ATTENTION_CASES if not _attention_holds(case, generator, device)]

    report = check(*_meta_step(generator, device), backend="fused")
    print(f"\nMAML, 2 layers, 3 inner steps, float32 on {device}\n{report}")
    if report.error > MOST_META_ERROR:
        failed.append("meta-gradient")
    print("\n" + (f"FAILED: {', '.join(failed)}" if failed else "all within bounds"))
    return 1 if failed else 0


def _attention_holds(case: AttentionCase, generator: torch.Generator, device: str) -> bool:
    inputs = case.inputs(torch.float32, generator, device)
    exact = second_order(_attention("reference"), inputs.to(torch.float64))
    errors = {}
    for backend in ("fused", "reference"):
        found = second_order(_attention(backend), inputs)
        errors[backend] = {name: relative_error(found[name], exact[name]) for name in exact}
    worst = {backend: max(by_name.values()) for backend, by_name in errors.items()}
    print(f"{case.name:<26}{worst['fused']:>10.1e}{worst['reference']:>10.1e}")
    # Twice eager's error, and where eager happens to be exact, a few units in the last place.
    return all(errors["fused"][name] <= 2 * errors["reference"][name] + 1e-6 for name in exact)


def _attention(backend: str):  # type: ignore[no-untyped-def]
    return lambda *args, **options: scaled_dot_product_attention(*args, **options, backend=backend)


def _meta_step(
    generator: torch.Generator, device: str
) -> tuple[MAML, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def draw(shots: int) -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.randint(1, 256, (4, shots, 32), generator=generator)
        return text.to(device), torch.randint(0, 5, (4, shots), generator=generator).to(device)

    return MAML(EncoderClassifier(classes=5).to(device), loss_fn, inner=inner.SGD(lr=0.1), steps=3), draw(10), draw(15)
