"""What a computation depends on besides its inputs, so that computing it again gives the same and changes nothing more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metafast.backend import requested_backend, use_backend


class Surroundings:
    """The random state, the backend, autocast and the model's buffers as they are now, before a computation.

    Args:
        device: where the computation runs.
        model: the module whose buffers it reads and may update.
    """

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        self._backend = requested_backend()
        self._devices = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(d) for d in self._devices]
        self._type = device.type
        self._autocast = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)
        self._buffers = Buffers(model)

    def computed(self) -> None:
        """To be called after the computation: forgets the buffers that it left alone."""
        self._buffers.keep_changed()

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Puts all of it back for a while. What happens to buffers inside is thrown away: they were updated before."""
        with (
            torch.random.fork_rng(self._devices),
            use_backend(self._backend),
            torch.autocast(self._type, dtype=self._dtype, enabled=self._autocast),
            self._buffers.scratch(),
        ):
            torch.set_rng_state(self._cpu)
            for device, saved in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(saved, device)
            yield


class Buffers:
    """The buffers of a model (running statistics of batch norm, say) as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor, int, Tensor]] = [
            (module, name, buffer, buffer._version, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def keep_changed(self) -> None:
        """Forgets the buffers that are certainly still as they were: large ones are masks, as a rule."""
        self._kept = [
            (module, name, buffer, version, value)
            for module, name, buffer, version, value in self._kept
            if may_have_changed(module._buffers[name], buffer, version)
        ]

    def restore(self) -> None:
        """Writes the earlier values back."""
        self.keep_changed()
        for module, name, buffer, _, value in self._kept:
            # Not without need: a graph may hold it, and would take it for changed.
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[name] = buffer

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """The earlier values stand in for the buffers, which are not touched."""
        now = [(module, name, module._buffers[name]) for module, name, *_ in self._kept]
        for module, name, _, _, value in self._kept:
            module._buffers[name] = value.clone()
        try:
            yield
        finally:
            for module, name, buffer in now:
                module._buffers[name] = buffer


def may_have_changed(now: Tensor | None, before: Tensor, version: int) -> bool:
    """Whether a buffer may differ from what it was: another tensor, or the same one since that version."""
    # Batch norm's kernels write running statistics without a new version.
    return now is not before or before._version != version or before.is_floating_point()
