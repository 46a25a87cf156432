"""Tile sizes, warps and pipeline stages: the one place that decides them.

Chosen by what the compiler reports (see ``compile.py``), not by timings: no or few spilled registers, and shared memory
that fits. From left to right the entries are for head dimensions up to 64, 128 and 256.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """How a kernel is cut: queries and keys a tile, warps a program, stages of its software pipeline."""

    query_block: int
    key_block: int
    num_warps: int
    num_stages: int


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


def choose_config(kernel: str, width: int, itemsize: int, precision: str, capability: tuple[int, int] | None) -> Config:
    """The configuration of a kernel.

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
