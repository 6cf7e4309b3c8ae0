"""Who reads which block in which round, so that a round deals out a bounded number of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpmp.checkpoint.needs import Catalogue, Part
from mpmp.programs.partition import partition

ROUND_BYTES = 32 << 20
"""What a rank deals out in a round, unless one block is wanted by so many that it is more."""


class Rounds:
    """The blocks that anybody wants, shared out evenly in their order; the same on every rank.

    ``wanted_by`` says of each block how many ranks want something of it.
    """

    def __init__(self, files: Catalogue, wanted_by: NDArray[np.int64], ranks: int) -> None:
        self._wanted = np.flatnonzero(wanted_by)
        sizes = np.array([files.block_bytes(int(block)) for block in self._wanted], dtype=np.int64)
        dealt = sizes * wanted_by[self._wanted]
        cuts = partition(len(self._wanted), ranks)
        self._reader = np.zeros(len(self._wanted), dtype=np.int64)
        self._turn = np.zeros(len(self._wanted), dtype=np.int64)
        for rank, (low, high) in enumerate(cuts):
            self._reader[low:high] = rank
            self._turn[low:high] = (np.cumsum(dealt[low:high]) - dealt[low:high]) // ROUND_BYTES
        self.number = int(self._turn.max(initial=-1)) + 1

    def of(self, block: int) -> tuple[int, int]:
        """Who reads a wanted block, and in which round."""
        at = np.searchsorted(self._wanted, block)
        return int(self._reader[at]), int(self._turn[at])

    def blocks(self, rank: int) -> dict[int, list[int]]:
        """What a rank reads in each round."""
        found: dict[int, list[int]] = {turn: [] for turn in range(self.number)}
        own = self._reader == rank
        for block, turn in zip(self._wanted[own].tolist(), self._turn[own].tolist(), strict=True):
            found[turn].append(block)
        return found


class Sorted:
    """Parts by who reads them and in which round, in an order that both sides know."""

    def __init__(self, parts: Iterable[Part], rounds: Rounds) -> None:
        self._found: dict[tuple[int, int], list[Part]] = {}
        for part in sorted(parts, key=lambda part: (part.block, part.need)):
            self._found.setdefault(rounds.of(part.block), []).append(part)

    def of(self, reader: int, turn: int) -> Sequence[Part]:
        return self._found.get((reader, turn), ())

    def read_by(self, rank: int) -> set[int]:
        """The needs of which a rank reads anything."""
        return {
            part.need
            for (reader, _), parts in self._found.items()
            if reader == rank
            for part in parts
        }


def size_of(parts: Sequence[Part]) -> int:
    return sum(part.size_bytes for part in parts)
