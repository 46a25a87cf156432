"""What every pass of attention is told besides its tensors: listed here once, and in ``Options`` of csrc/attention.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeAlias

from torch import Tensor

# A side of a window that limits nothing, and the bound of all others: more than any length, and few enough bits that sums
# of sides and lengths fit into 64.
NO_LIMIT = 2**40


@dataclass(frozen=True)
class Options:
    """The numbers among the options. One object on the way from the public function to the kernels.

    Args:
        left, right: row i attends to columns i − left ≤ j ≤ i + right only, besides what a mask allows. Either may be
            negative; ``NO_LIMIT``: no limit.
        dropout_p: probability of dropping a weight; read where there are seeds.
        scale: factor of the scores.
    """

    left: int
    right: int
    dropout_p: float
    scale: float


@lru_cache(maxsize=128)
def shared_options(*numbers: Any) -> Options:
    """``Options(*numbers)``, made once: most calls are alike, and looking one up takes less time than making it."""
    return Options(*numbers)


# The options of a call: ``attn_mask``, ``seeds`` of dropout, ``key_ranges`` (which keys exist), and the numbers. They end
# the arguments of every pass. The mask alone is differentiable.
Told: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Options]

# The same as torch's dispatcher takes it, which knows no dataclass.
SCHEMA = "Tensor? attn_mask, Tensor? seeds, Tensor? key_ranges, " + ", ".join(
    f"{field.type} {field.name}" for field in fields(Options)
)
COUNT = SCHEMA.count(",") + 1
_first_number = -len(fields(Options))


def to_op(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of an op for those of a pass, or for what ends them."""
    return *arguments[:-1], *vars(arguments[-1]).values()


def from_op(arguments: Sequence[Any]) -> tuple[tuple[Any, ...], Told]:
    """What a pass takes for itself, and what it is told, for the arguments of an op."""
    told = (*arguments[-COUNT:_first_number], Options(*arguments[_first_number:]))
    return tuple(arguments[:-COUNT]), told
