"""The two binary trees of a double tree: in order, with the odd numbers as leaves.

      number    0               A number hangs below the next multiple of twice its lowest bit,
                8               or where that is too big below what is left without that bit.
              4   10            The first tree's numbers are the ranks. The second is the mirror
             2 6 9  11          image of the first, or for odd p the first moved on by one, so
            1 3 5 7             that its inner ranks are the leaves of the other.

Sanders, Speck, Traeff 2009; as NCCL numbers them.
"""

from __future__ import annotations

from mpmp.programs.steps import NONE, Ranks, where


class BinaryTree:
    """Where ``rank`` stands in the first or the second tree of ``size`` ranks."""

    def __init__(self, rank: Ranks, size: int, second: bool = False) -> None:
        self.size, self.second = size, second
        self.height = (size - 1).bit_length()
        number = self._turned(rank, -1)
        self.parent = where(number == 0, NONE, self._turned(self._above(number), 1))
        self.depth = number * 0
        above = number
        for _ in range(self.height):
            self.depth = self.depth + (above != 0)
            above = self._above(above)
        bit = where(number == 0, 1 << self.height, number & -number)
        lower = where((number > 0) & (bit > 1), self._turned(number - bit // 2, 1), NONE)
        step = bit // 2
        for _ in range(self.height):
            step = where(number + step < size, step, step // 2)
        self.children = lower, where(step > 0, self._turned(number + step, 1), NONE)

    def at(self, segment: Ranks, segments: int, peer: Ranks) -> Ranks:
        """The peer while there is such a segment."""
        return where((segment >= 0) & (segment < segments), peer, NONE)

    def _above(self, number: Ranks) -> Ranks:
        bit = number & -number
        above = (number ^ bit) | (bit << 1)
        return where(above < self.size, above, number ^ bit)

    def _turned(self, number: Ranks, sign: int) -> Ranks:
        """From a rank to its number in the tree (sign -1), or back (sign 1)."""
        if not self.second:
            return number
        return self.size - 1 - number if self.size % 2 == 0 else (number + sign) % self.size
