"""Several families of tasks as one stream, for multi-task learning."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from metafast.arguments import check_positive
from metafast.tasks.source import Episode, Tasks, generator_of

__all__ = ["Mixture", "size_shares"]


class Mixture(Tasks):
    """Episodes of several families. A family is drawn by its share, and then one of its own episodes.

    Episodes come in blocks of one family. With ``block`` the number of tasks of a batch, families with different batches
    can be mixed.

    Args:
        families: sources by name.
        shares: how often a family is drawn, in proportion; None: all alike. :func:`size_shares` gives size-tempered ones.
        block: successive episodes of the same family.
        seed: seed of the draw of families; their episodes have their own.

    Attributes:
        names: names of the families.

    Raises:
        TypeError: a family is no source of tasks.
        ValueError: there is no family, or shares are not positive numbers of the same names.
    """

    def __init__(
        self,
        families: Mapping[str, Tasks],
        shares: Mapping[str, float] | None = None,
        *,
        block: int = 1,
        seed: int = 0,
    ) -> None:
        if not families:
            raise ValueError("families: expected at least one, got none")
        for name, family in families.items():
            if not isinstance(family, Tasks):
                raise TypeError(f"families: expected sources of tasks, got {type(family).__name__} as {name!r}")
        super().__init__(seed)
        self.names = tuple(families)
        self.families = dict(families)
        self.block = check_positive("block", block)
        shares = dict.fromkeys(families, 1.0) if shares is None else shares
        if set(shares) != set(families) or any(share <= 0 for share in shares.values()):
            raise ValueError(
                f"shares: expected a positive number for each of {', '.join(families)}, got {dict(shares)}"
            )
        self._shares = torch.tensor([float(shares[name]) for name in families], dtype=torch.float64)
        paddings = [family.padding for family in families.values()]
        self.padding = {leaf: value for padding in paddings for leaf, value in padding.items()}
        if any(padding.get(leaf, self.padding[leaf]) != self.padding[leaf] for padding in paddings for leaf in padding):
            raise ValueError("families: expected one padding value of a leaf, got several; use one tokenizer")
        self.multiple = max(family.multiple for family in families.values())

    def family_of(self, number: int) -> str:
        """The name of the family of an episode."""
        generator = generator_of(self.seed, number // self.block)
        return self.names[int(torch.multinomial(self._shares, 1, generator=generator))]

    def __getitem__(self, number: int) -> Episode:
        """Episode ``number`` of the mixture: the episode of that number of its family."""
        return self.families[self.family_of(number)][number]


def size_shares(sizes: Mapping[str, int], temperature: float = 1.0) -> dict[str, float]:
    """Shares in proportion to size^(1/temperature) (Arivazhagan et al. 2019, arXiv:1907.05019, section 4.2).

    Args:
        sizes: how much data each family has.
        temperature: 1 keeps the sizes' proportions; larger ones draw small families more often.

    Returns:
        shares whose sum is 1.

    Raises:
        ValueError: a size or the temperature is not positive.
    """
    if temperature <= 0 or not sizes or any(size <= 0 for size in sizes.values()):
        raise ValueError(f"sizes, temperature: expected positive numbers, got {dict(sizes)} and {temperature}")
    powers = {name: size ** (1 / temperature) for name, size in sizes.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}
