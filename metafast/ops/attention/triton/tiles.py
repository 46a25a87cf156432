"""Which tiles a kernel gets: their sizes, warps and pipeline stages, from a table or as measured on a kind of GPU.

``METAFAST_AUTOTUNE`` decides, on a real GPU. Unset: choices that were once measured on this kind of GPU, else the table;
nothing is timed. ``1``: what is missing is measured at its first launch, which then takes minutes. ``0``: the table alone.
``tune.py`` measures usual shapes ahead. Choices lie in ``$METAFAST_CACHE_DIR``, or ``~/.cache/metafast``, in one JSON file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger("metafast")
FILE_NAME = "attention-configs.json"
# A thread has 255 registers: so many of them may be accumulators, the rest are addresses, operands and row statistics.
ACCUMULATOR_REGISTERS = 160
LENGTHS = (64, 16384)


class Config(NamedTuple):
    """How a kernel is cut: queries and keys a tile, warps a program, stages of its software pipeline."""

    query_block: int
    key_block: int
    num_warps: int
    num_stages: int


# The table follows what the compiler reports (see compile.py), not timings: no or few spilled registers, and shared memory
# that fits. From left to right the entries are for head dimensions up to 64, 128 and 256.
_Table = dict[str, tuple[Config, Config, Config]]

# wgmma needs 64 rows, so on Hopper the other side of a tile shrinks as registers run out.
_HALF_HOPPER: _Table = {
    "forward_kernel": (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2)),
    "backward_query_kernel": (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 32, 8, 2)),
    "backward_key_kernel": (Config(64, 64, 4, 2), Config(32, 64, 4, 2), Config(32, 64, 8, 2)),
    "jvp_kernel": (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(16, 64, 8, 1)),
    "backward_jvp_query_kernel": (Config(64, 32, 4, 2), Config(128, 32, 8, 2), Config(16, 64, 8, 1)),
    "backward_jvp_key_kernel": (Config(32, 64, 4, 2), Config(32, 128, 8, 2), Config(64, 16, 8, 1)),
    "mask_backward_kernel": (Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    "mask_backward_jvp_kernel": (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(16, 32, 8, 1)),
}
# Tiles whose accumulators need more than 512 columns of tensor memory do not start.
_HALF_BLACKWELL: _Table = {
    "forward_kernel": (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(16, 64, 8, 1)),
    "backward_query_kernel": (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(32, 32, 8, 1)),
    "backward_key_kernel": (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(32, 32, 8, 1)),
    "jvp_kernel": (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(16, 64, 8, 1)),
    "backward_jvp_query_kernel": (Config(64, 32, 4, 2), Config(64, 32, 8, 2), Config(16, 32, 8, 1)),
    "backward_jvp_key_kernel": (Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(32, 16, 8, 1)),
    "mask_backward_kernel": (Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    "mask_backward_jvp_kernel": (Config(64, 64, 8, 1), Config(64, 32, 8, 2), Config(16, 32, 8, 1)),
}
# Everything else, within the 99 KiB of shared memory that the smaller Ampere, Ada and Blackwell chips have.
_HALF: _Table = {
    "forward_kernel": (Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(64, 16, 8, 1)),
    "backward_query_kernel": (Config(64, 32, 4, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    "backward_key_kernel": (Config(32, 64, 4, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    "jvp_kernel": (Config(64, 32, 4, 2), Config(32, 64, 8, 2), Config(16, 32, 8, 1)),
    "backward_jvp_query_kernel": (Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 32, 8, 1)),
    "backward_jvp_key_kernel": (Config(32, 64, 8, 2), Config(32, 32, 8, 2), Config(32, 16, 8, 1)),
    "mask_backward_kernel": (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 8, 1)),
    "mask_backward_jvp_kernel": (Config(64, 32, 8, 2), Config(16, 64, 8, 1), Config(16, 32, 8, 1)),
}
_TF32 = (Config(32, 32, 8, 2), Config(16, 32, 8, 1), Config(16, 16, 8, 1))
# Without tensor cores a thread holds whole rows of what it multiplies, which is what limits these.
_IEEE = (Config(32, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
_IEEE_OF_TWO = (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1))
_IEEE_SMALL = (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
_IEEE_TABLE = {
    "jvp_kernel": _IEEE_SMALL,
    "backward_jvp_key_kernel": _IEEE_SMALL,
    "mask_backward_kernel": _IEEE_OF_TWO,
}
# Unequal on purpose: small tests then cross block borders in every way.
_INTERPRETER = Config(32, 64, 1, 1)


def table(kernel: str, width: int, itemsize: int, precision: str, capability: tuple[int, int] | None) -> Config:
    """The configuration of a kernel where none was measured.

    Args:
        kernel: the kernel's name.
        width: padded head dimension, the larger of keys' and values'.
        itemsize: bytes an element of the inputs.
        precision: of float32 products, ``"tf32"`` or ``"ieee"``.
        capability: compute capability of the device, ``(major, minor)``; None in Triton's interpreter.
    """
    if capability is None:
        return _INTERPRETER
    if itemsize == 4 and precision == "tf32":
        choice = _TF32
    elif itemsize == 4:
        choice = _IEEE_TABLE.get(kernel, _IEEE)
    else:
        choice = {9: _HALF_HOPPER, 10: _HALF_BLACKWELL}.get(capability[0], _HALF)[kernel]
    return choice[0 if width <= 64 else 1 if width <= 128 else 2]


class Key(NamedTuple):
    """What a choice depends on; ``length`` is a bucket, ``flags`` the options that the kernel was compiled with."""

    gpu: str
    triton: str
    kernel: str
    dtype: str
    precision: str
    head_block: int
    value_block: int
    queries: int
    keys: int
    flags: str

    def text(self) -> str:
        return "|".join(map(str, self))


class _Tiles(NamedTuple):
    """Tiles of a kernel, as numbers of (head-wide, value-wide) ones: kept while it loops, loaded at each step, accumulated.

    ``products`` counts the tiles of query block × key block that are in flight; ``by_keys`` says that a program keeps keys.
    """

    kept: tuple[int, int]
    loaded: tuple[int, int]
    accumulated: tuple[int, int]
    products: int
    by_keys: bool = False


_TILES = {
    "forward_kernel": _Tiles((1, 0), (1, 1), (0, 1), 1),
    "backward_query_kernel": _Tiles((1, 1), (1, 1), (1, 0), 2),
    "backward_key_kernel": _Tiles((1, 1), (1, 1), (1, 1), 2, True),
    "jvp_kernel": _Tiles((2, 0), (2, 2), (0, 1), 2),
    "backward_jvp_query_kernel": _Tiles((2, 2), (2, 2), (1, 0), 4),
    "backward_jvp_key_kernel": _Tiles((2, 2), (2, 2), (1, 1), 4, True),
    "mask_backward_kernel": _Tiles((0, 0), (2, 2), (0, 0), 3),
    "mask_backward_jvp_kernel": _Tiles((0, 0), (4, 4), (0, 0), 5),
}


def bucket(length: int) -> int:
    """The next power of two, within LENGTHS."""
    return min(max(1 << (length - 1).bit_length() if length > 1 else 1, LENGTHS[0]), LENGTHS[1])


def space(
    kernel: str, head_block: int, value_block: int, itemsize: int, shared_memory: int, default: Config
) -> list[Config]:
    """Configurations worth timing, ``default`` first.

    Args:
        kernel: its name.
        head_block, value_block: padded widths of keys and values.
        itemsize: bytes an element.
        shared_memory: bytes of it that a program may have.
        default: the table's choice.
    """
    tiles, widths = _TILES[kernel], (head_block, value_block)

    def wide(counts: tuple[int, int]) -> int:
        return sum(count * width for count, width in zip(counts, widths, strict=True))

    def fits(config: Config) -> bool:
        rows = (config.query_block, config.key_block)
        kept_rows, loaded_rows = reversed(rows) if tiles.by_keys else rows
        shared = itemsize * (kept_rows * wide(tiles.kept) + config.num_stages * loaded_rows * wide(tiles.loaded))
        accumulators = kept_rows * wide(tiles.accumulated) + tiles.products * math.prod(rows)
        registers = accumulators / (32 * config.num_warps)
        # Below a few numbers a thread, half of the warps have nothing to multiply.
        return shared <= shared_memory and 8 <= registers <= ACCUMULATOR_REGISTERS

    # Wide or exact products leave room for small tiles only, the others gain nothing from them.
    small = itemsize == 4 or max(widths) > 128
    sizes, stages_of = ((16, 32, 64), (1, 2)) if small else ((32, 64, 128), (2, 3))
    found = [
        Config(query_block, key_block, warps, stages)
        for query_block in sizes
        for key_block in sizes
        for warps in (4, 8)
        for stages in stages_of
    ]
    return [default, *(config for config in found if config != default and fits(config))]


def fastest(candidates: list[Config], measure: Callable[[Config], float]) -> Config:
    """The configuration that ``measure`` gives the least; the first, where none is finite or several are equal."""
    return min(candidates, key=measure)


class Choices:
    """The choices in one file. Writers replace it as a whole, so that readers never see half of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, Config] | None = None

    def __bool__(self) -> bool:
        return bool(self._all())

    def get(self, key: Key) -> Config | None:
        return self._all().get(key.text())

    def put(self, key: Key, config: Config) -> None:
        """Adds a choice to those that are in the file by now, whoever wrote them."""
        with self._lock:
            self._known = self._read() | {key.text(): config}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(self._known, file, indent=1, sort_keys=True)
                os.replace(name, self.path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
                raise

    def _all(self) -> dict[str, Config]:
        if self._known is None:
            with self._lock:
                self._known = self._read()
        return self._known

    def _read(self) -> dict[str, Config]:
        try:
            return dict(_checked(json.loads(self.path.read_text())))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"{self.path}: ignored, the table decides instead ({error})", stacklevel=2)
            return {}


def _checked(entries: Any) -> Iterator[tuple[str, Config]]:
    if not isinstance(entries, dict):
        raise ValueError("expected an object")
    for key, numbers in entries.items():
        if not isinstance(numbers, list) or len(numbers) != 4 or any(type(n) is not int or n < 1 for n in numbers):
            raise ValueError(f"expected four positive numbers for {key}, got {numbers!r}")
        yield key, Config(*numbers)


def mode() -> str:
    """``METAFAST_AUTOTUNE``, or "cached" where it is not set."""
    value = os.environ.get("METAFAST_AUTOTUNE") or "cached"
    if value not in ("0", "1", "cached"):
        raise ValueError(f"METAFAST_AUTOTUNE: expected 0 or 1, got {value!r}")
    return value


def choices() -> Choices:
    """Those of the folder that the environment names now."""
    folder = os.environ.get("METAFAST_CACHE_DIR")
    path = (Path(folder) if folder else Path.home() / ".cache" / "metafast") / FILE_NAME
    return _files.setdefault(path, Choices(path))


_files: dict[Path, Choices] = {}


def choose(
    default: Config,
    describe: Callable[[], Key],
    candidates: Callable[[], list[Config]],
    measure: Callable[[Config], float],
) -> Config:
    """The configuration of a launch: see the module.

    Args:
        default: the table's.
        describe: the key; asked for only where a choice may exist or is to be made, as are the others.
        candidates: what to measure, best guess first.
        measure: milliseconds of a configuration, infinite where it does not start.
    """
    how = mode()
    if how == "0" or (how == "cached" and not choices()):
        return default
    key = describe()
    known = choices().get(key)
    if known is None and how == "1":
        known = fastest(candidates(), measure)
        logger.info("attention: measured %s: %s", key.text(), known)
        choices().put(key, known)
    return known or default
