"""Fold: a group of any size seen as one whose size is a power of two.

    ranks     0 1   2 3   4   5      size 6: the first 2 x surplus ranks pair up,
              |/    |/    |   |      and the lower of a pair speaks for both.
    virtual    0     1    2   3      A pair holds two chunks, so that virtual neighbours
    chunks    0 1   2 3   4   5      own neighbouring chunks.

Costs one round before and one round after. Thakur, Rabenseifner, Gropp 2005, section 4.5.
"""

from __future__ import annotations

from mpmp.programs.steps import NONE, Ranks, where


class Fold:
    """Where ``rank`` stands in the folded group of ``size`` ranks."""

    def __init__(self, rank: Ranks, size: int) -> None:
        self.distances = [1 << bit for bit in range(size.bit_length() - 1)]
        self.surplus = size - (1 << len(self.distances))
        paired = rank < 2 * self.surplus
        self.virtual = where(paired, rank // 2, rank - self.surplus)
        # The peer that speaks for this rank, and the peer this rank speaks for.
        self.lower = where(paired & (rank % 2 == 1), rank - 1, NONE)
        self.upper = where(paired & (rank % 2 == 0), rank + 1, NONE)

    @property
    def num_rounds(self) -> int:
        """One round for each distance, and where ranks are folded one before and one after."""
        return len(self.distances) + (2 if self.surplus else 0)

    def first(self, virtual: Ranks) -> Ranks:
        """The rank that speaks for ``virtual``, which is its first chunk as well."""
        return virtual + where(virtual < self.surplus, virtual, self.surplus)

    def partner(self, distance: int) -> Ranks:
        """The peer across ``distance`` virtual ranks; a rank that was folded away has none."""
        return where(self.lower == NONE, self.first(self.virtual ^ distance), NONE)

    def block(self, virtual: Ranks, length: int) -> tuple[Ranks, Ranks]:
        """First chunk and number of chunks of the aligned ``length`` virtual ranks around one."""
        start = virtual & -length
        chunk = self.first(start)
        return chunk, self.first(start + length) - chunk
