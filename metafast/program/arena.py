"""Places of intermediate values in one block of memory. A place is used again as soon as its value is dead."""

from __future__ import annotations

import bisect
import mmap
from dataclasses import dataclass, field

import torch

# Of every place, in bytes: a cache line, and what vector instructions like.
ALIGNMENT = 64


@dataclass
class Arena:
    """Places in one block of memory. They are taken and given back in the order of execution, which gives the block's size.

    The smallest free place that fits is taken. So the place that was given back last is often taken next, while it is in the
    cache.
    """

    size: int = 0
    # Free places by offset: disjoint, never adjacent.
    _offsets: list[int] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)

    def take(self, size: int) -> int:
        """The offset of a place of that many bytes."""
        size = rounded(size)
        fitting = [i for i, free in enumerate(self._sizes) if free >= size]
        if fitting:
            best = min(fitting, key=self._sizes.__getitem__)
            offset = self._offsets[best]
            self._offsets[best] += size
            self._sizes[best] -= size
            if self._sizes[best] == 0:
                del self._offsets[best], self._sizes[best]
            return offset
        # The block grows; a free place at its end becomes part of the new one.
        if self._offsets and self._offsets[-1] + self._sizes[-1] == self.size:
            offset = self._offsets.pop()
            self._sizes.pop()
        else:
            offset = self.size
        self.size = offset + size
        return offset

    def give_back(self, offset: int, size: int) -> None:
        """Ends the use of a place of that many bytes."""
        size = rounded(size)
        at = bisect.bisect(self._offsets, offset)
        self._offsets.insert(at, offset)
        self._sizes.insert(at, size)
        for left in (at, at - 1):
            if (
                0 <= left < len(self._offsets) - 1
                and self._offsets[left] + self._sizes[left] == self._offsets[left + 1]
            ):
                self._sizes[left] += self._sizes.pop(left + 1)
                del self._offsets[left + 1]


def rounded(size: int) -> int:
    """Bytes that a place of ``size`` takes."""
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT


def block(size: int, device: torch.device) -> torch.UntypedStorage:
    """Memory for an arena of ``size`` bytes.

    On the CPU it consists of huge pages, where Linux gives them on request. A replay goes through the whole block, which has
    more small pages than the processor keeps addresses for.
    """
    if device.type != "cpu" or not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
