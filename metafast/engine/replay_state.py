"""State that a computation depends on besides its inputs: put back, so that computing again gives the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metafast.backend import requested_backend, use_backend
from metafast.engine.embedding_rows import are_sparse_gradients_taken, sparse_gradients
from metafast.engine.module_attributes import Attributes, Change
from metafast.engine.placed_tensors import placed
from metafast.ops import torch_internals
from metafast.program import is_recording


class ReplayState:
    """What a computation depends on besides its inputs, as it is before it.

    The random state, the backend, autocast, whether tables get sparse gradients, and the model's buffers, attributes and
    parameters that a forward writes to.

    Args:
        device: where the computation runs.
        model: the module whose buffers it reads and may update.
    """

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        self._backend = requested_backend()
        self._devices = [device] if device.type == "cuda" else []
        self._random = RandomState(device)
        self._type = device.type
        self._autocast = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)
        self._sparse = are_sparse_gradients_taken()
        self._buffers = Buffers(model)
        self._attributes = Attributes(model)
        self._model = model
        self._tables = {name: _leaf(table) for name, table in written_parameters(model).items()}

    def forget_unchanged(self) -> None:
        """Forgets the buffers and attributes that the computation has not changed; to be called after it."""
        self._buffers.keep_changed()
        self._attributes.keep_changed()

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Puts the whole state back for the ``with`` block.

        Changes of buffers and attributes inside are thrown away, since the first computation made them already.
        """
        with (
            torch.random.fork_rng(self._devices),
            use_backend(self._backend),
            torch.autocast(self._type, dtype=self._dtype, enabled=self._autocast),
            sparse_gradients(self._sparse),
            self._buffers.scratch(),
            self._attributes.scratch(),
            placed(self._model, {name: _leaf(table) for name, table in self._tables.items()}),
        ):
            self._random.restore()
            yield


def _leaf(table: Tensor) -> Tensor:
    """A copy that requires a gradient where the parameter does: a learner may start from it."""
    return table.detach().clone().requires_grad_(table.requires_grad)


def written_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that a forward writes to, those of embeddings with ``max_norm``, by their first names."""
    written = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    }
    return {name: p for name, p in model.named_parameters() if id(p) in written} if written else {}


class RandomState:
    """The random state of the CPU, and of the device if that is another one, as it is now."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type == "cuda" else None
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)

    def restore(self) -> None:
        """Puts it back."""
        torch.set_rng_state(self._cpu)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Buffers:
    """The buffers of a model (running statistics of batch norm, say) as they are now."""

    def __init__(self, model: nn.Module) -> None:
        # One that several modules hold is one here, too.
        values: dict[int, Tensor] = {}
        self._kept: list[tuple[str, nn.Module, str, Tensor, int, Tensor]] = [
            (f"{path}.{name}" if path else name, module, name, buffer, buffer._version, _copied(buffer, values))
            for path, module in model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def keep_changed(self) -> None:
        """Forgets the buffers that are certainly still as they were: large ones are masks, as a rule."""
        self._kept = [kept for kept in self._kept if may_have_changed(kept[1]._buffers[kept[2]], *kept[3:5])]

    def changes(self) -> list[Change]:
        """The buffers that other tensors stand in for, or that have other values."""
        return [
            Change(path, module._buffers, name, value, module._buffers[name])
            for path, module, name, buffer, version, value in self._kept
            if module._buffers[name] is not buffer
            or (may_have_changed(buffer, buffer, version) and not torch.equal(buffer, value))
        ]

    def restore(self) -> None:
        """Writes the earlier values back."""
        self.keep_changed()
        for _, module, name, buffer, version, value in self._kept:
            # Not without need: a graph may hold it, and would take it for changed. Tensors that are being recorded have no
            # values to compare; no kernel of batch norm writes to them under vmap.
            if buffer._version != version if is_recording() else not torch.equal(buffer, value):
                # A graph from before may hold it, with this very value.
                with torch.no_grad(), torch_internals.preserving_version(buffer):
                    buffer.copy_(value)
            module._buffers[name] = buffer

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """The earlier values stand in for the buffers, which are not touched."""
        now = [(module, name, module._buffers[name]) for _, module, name, *_ in self._kept]
        values: dict[int, Tensor] = {}
        for _, module, name, _, _, value in self._kept:
            module._buffers[name] = _copied(value, values)
        try:
            yield
        finally:
            for module, name, buffer in now:
                module._buffers[name] = buffer


def _copied(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.detach().clone()
    return copies[id(tensor)]


def may_have_changed(now: Tensor | None, before: Tensor, version: int) -> bool:
    """Whether a buffer may differ from what it was: another tensor, or the same one since that version."""
    # Batch norm's kernels write running statistics without a new version.
    return now is not before or before._version != version or before.is_floating_point()
