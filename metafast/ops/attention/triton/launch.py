"""From tensors to launches: flattens leading dimensions, describes strides and masks, and starts kernels."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from metafast.ops.attention.options import Options
from metafast.ops.attention.triton import tiles
from metafast.ops.attention.triton.common import Mask, Matrix, Settings
from metafast.ops.attention.triton.tiles import Config

# Offsets inside a tile are computed in 32 bits: larger strides between rows would overflow in a tile of 128 rows.
LARGEST_ROW_STRIDE = 2**23


class Device:
    """Runs kernels on the device of their arguments."""

    def capability(self, device: torch.device) -> tuple[int, int] | None:
        """Compute capability; None for the CPU, where only Triton's interpreter can run."""
        return _capability(device) if device.type == "cuda" else None

    def launch(self, kernel: Any, programs: int, arguments: dict[str, Any], device: torch.device) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](**arguments)

    def configure(
        self,
        default: Config,
        device: torch.device,
        describe: Callable[[str], tiles.Key],
        candidates: Callable[[int], list[Config]],
        run: Callable[[Config], None],
    ) -> Config:
        """The table's configuration, or what was measured on this kind of GPU: see ``tiles.py``.

        Args:
            describe: the key of a launch on a GPU of that name.
            candidates: configurations for a GPU with that many bytes of shared memory a program.
            run: launches in a configuration; what a kernel writes is the same whenever it is repeated.
        """
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return default
        return tiles.choose(
            default,
            lambda: describe(torch.cuda.get_device_name(device)),
            lambda: candidates(_shared_memory(device)),
            lambda config: _milliseconds(functools.partial(run, config)),
        )


# The compile report puts a GPU that need not be there in its place.
executor: ContextVar[Device] = ContextVar("executor", default=Device())  # noqa: B039 - it has no state


_LAST_WORD = 2**32 - 1


class Problem:
    """One call of attention: its sizes, its options, and how its tensors are flattened to ``[batch, head, row, column]``.

    Args: as of the raw ops (see the package).
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        seeds: Tensor | None,
        key_ranges: Tensor | None,
        options: Options,
    ) -> None:
        *self.lead, self.heads, self.n_queries, self.head_dim = query.shape
        self.kv_heads, self.n_keys, self.value_dim = value.shape[-3:]
        self.head_block, self.value_block = (
            max(16, triton.next_power_of_2(width)) for width in (self.head_dim, self.value_dim)
        )
        self.batches = math.prod(self.lead)
        self.dtype, self.device = query.dtype, query.device
        self.mask = self.describe_mask(attn_mask)
        self.settings = Settings(
            # A side that limits nothing is none: the kernels have no code for it. One that leaves nothing leaves nothing
            # at a bound too, and the kernels' numbers have 32 bits.
            left=max(options.left, -self.n_keys) if options.left < self.n_queries - 1 else None,
            end=max(options.right + 1, -self.n_queries) if options.right < self.n_keys - 1 else None,
            key_ranges=None if key_ranges is None else key_ranges.reshape(-1).contiguous(),
            dropout_seeds=None,
            dropout_threshold=None,
            dropout_factor=None,
            scale=float(options.scale),
        )
        if seeds is not None:
            self.settings = self.settings._replace(
                dropout_seeds=seeds.reshape(-1).contiguous(),
                dropout_threshold=min(round(options.dropout_p * 2**32), _LAST_WORD),
                dropout_factor=1.0 / (1.0 - options.dropout_p) if options.dropout_p < 1.0 else math.inf,
            )

    def flatten(self, tensor: Tensor) -> Tensor:
        """``[*lead, heads, rows, columns]`` as ``[batch, heads, rows, columns]``; copied if kernels cannot read it."""
        tensor = tensor.reshape(self.batches, *tensor.shape[-3:])
        if tensor.stride(-1) != 1 or tensor.stride(-2) > LARGEST_ROW_STRIDE:
            tensor = tensor.contiguous()
        return tensor

    def unflatten(self, tensor: Tensor) -> Tensor:
        return tensor.view(*self.lead, *tensor.shape[1:])

    def empty_statistic(self, *numbers: int) -> Tensor:
        """One float32 a query, or several: ``[*lead, heads, n_queries, *numbers]``."""
        return torch.empty(*self.lead, self.heads, self.n_queries, *numbers, dtype=torch.float32, device=self.device)

    def query_programs(self, config: Config) -> int:
        """One program a block of queries of each head."""
        return self.batches * self.heads * triton.cdiv(self.n_queries, config.query_block)

    def key_programs(self, config: Config) -> int:
        """One program a block of keys of each of their heads."""
        return self.batches * self.kv_heads * triton.cdiv(self.n_keys, config.key_block)

    def launch(self, kernel: Any, programs: Callable[[Config], int], **arguments: Any) -> None:
        """Starts ``kernel`` as its configuration says.

        Args:
            programs: their number in a configuration.
            arguments: the kernel's own; what all kernels have in common is added here.
        """
        precision = _dot_precision(self.dtype)
        width, capability = max(self.head_block, self.value_block), executor.get().capability(self.device)
        name, itemsize, widths = kernel.__name__, self.dtype.itemsize, (self.head_block, self.value_block)
        default = tiles.table(name, width, itemsize, precision, capability)

        def run(config: Config) -> None:
            self.start(
                kernel,
                programs(config),
                **arguments,
                mask=self.mask,
                settings=self.settings,
                n_queries=self.n_queries,
                n_keys=self.n_keys,
                heads=self.heads,
                group=self.heads // self.kv_heads,
                HEAD_DIM=self.head_dim,
                VALUE_DIM=self.value_dim,
                HEAD_BLOCK=self.head_block,
                VALUE_BLOCK=self.value_block,
                QUERY_BLOCK=config.query_block,
                KEY_BLOCK=config.key_block,
                PRECISION=precision,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )

        run(
            executor.get().configure(
                default,
                self.device,
                lambda gpu: self._key(gpu, name, precision, arguments),
                lambda shared: tiles.space(name, *widths, itemsize, shared, default),
                run,
            )
        )

    def _key(self, gpu: str, kernel: str, precision: str, arguments: dict[str, Any]) -> tiles.Key:
        """What the choice of a configuration depends on."""
        mask = self.mask.pointer
        flags = {
            "left": self.settings.left is not None,
            "right": self.settings.end is not None,
            "ranges": self.settings.key_ranges is not None,
            "additive" if mask is not None and mask.is_floating_point() else "boolean": mask is not None,
            "dropout": self.settings.dropout_seeds is not None,
            "grouped": self.heads > self.kv_heads,
            "tangent_grad_out": arguments.get("tangent_grad_out") is not None,
        }
        return tiles.Key(
            gpu,
            triton.__version__,
            kernel,
            str(self.dtype).removeprefix("torch."),
            precision,
            self.head_block,
            self.value_block,
            tiles.bucket(self.n_queries),
            tiles.bucket(self.n_keys),
            ",".join(flag for flag, is_on in flags.items() if is_on),
        )

    def start(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """Starts ``kernel`` with these arguments and no others, unless there is nothing to do."""
        if programs > 0:
            executor.get().launch(kernel, programs, arguments, self.device)

    def describe_mask(self, mask: Tensor | None) -> Mask:
        """The mask without its broadcast dimensions, its leading ones joined to one; it is never expanded."""
        if mask is None:
            return Mask(*(None,) * len(Mask._fields))
        for dim in range(mask.dim()):
            if mask.stride(dim) == 0:
                mask = mask.narrow(dim, 0, 1)
        lead, sizes = mask.shape[:-3], mask.shape[-3:]
        mask = mask.reshape(-1, *sizes)
        if any(
            size > 1 and stride > LARGEST_ROW_STRIDE for size, stride in zip(sizes[1:], mask.stride()[2:], strict=True)
        ):
            mask = mask.contiguous()
        batches = None
        if 1 < mask.shape[0] < self.batches:
            batches = torch.arange(mask.shape[0], device=mask.device).view(lead).expand(self.lead).reshape(-1)
        batch, head, row, column = (
            stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True)
        )
        data = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        return Mask(data, batches, batch, head, row if sizes[1] > 1 else None, column)


def matrix(tensor: Tensor) -> Matrix:
    """A flattened tensor as an argument of a kernel."""
    return Matrix(tensor, *tensor.stride()[:3])


def empty_like(tensor: Tensor, columns: int | None = None) -> Tensor:
    """A flattened output in the memory order of ``tensor``, or contiguous where it has another number of columns."""
    if columns is not None and columns != tensor.shape[-1]:
        return torch.empty(*tensor.shape[:-1], columns, dtype=tensor.dtype, device=tensor.device)
    like = torch.empty_like(tensor)
    # The order inferred for a tensor that is itself broadcast need not end with the columns.
    return like if like.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _dot_precision(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have, as Triton itself asks for them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _milliseconds(run: Callable[[], None]) -> float:
    """Median time of a launch; infinite where the GPU cannot hold what it needs or the compiler refuses."""
    try:
        return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))
    except TritonError:
        return math.inf


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
