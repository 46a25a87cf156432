"""What RNNs need when other tensors take the place of their parameters."""

from __future__ import annotations

from torch import nn


def refresh_flat_weights(module: nn.Module) -> None:
    """RNNs keep their parameters in a list as well: puts the present ones there."""
    names = getattr(module, "_flat_weights_names", None)
    if names is not None:
        module._flat_weights = [module._parameters.get(name) for name in names]  # type: ignore[assignment]
