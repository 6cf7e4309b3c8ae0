"""The binomial tree of a gather or a scatter: who hangs below whom, and with which chunks.

      0 - 4 - 6 - 7     Rank 4 has the chunks 4-7 of its subtree: to its parent it is one message.
      |   5             With another root everything moves on in a circle, and so do the chunks.
      2 - 3
      1

Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpmp.programs.collectives.compose import cyclic
from mpmp.programs.steps import NONE, Ranks, where

Spans = list[tuple[Ranks, Ranks, Ranks]]
"""(chunk, peer, count), the words of a step."""


@dataclass(frozen=True, slots=True)
class Edges:
    """What ``rank`` does in the round of one distance: with its parent, or with a child."""

    with_parent: Spans
    with_child: Spans


def edges(rank: Ranks, size: int, root: int) -> list[Edges]:
    """For the distances 1, 2, 4, ... from the leaves to the root."""
    place = (rank - root) % size
    found = []
    for bit in range((size - 1).bit_length()):
        distance = 1 << bit
        parent = where(place % (2 * distance) == distance, (rank - distance) % size, NONE)
        has_child = (place % (2 * distance) == 0) & (place + distance < size)
        child = where(has_child, (rank + distance) % size, NONE)
        own = _at_most(distance, size - place)
        below = _at_most(distance, size - place - distance)
        found.append(
            Edges(
                cyclic(rank, own, size, parent),
                cyclic((rank + distance) % size, below, size, child),
            )
        )
    return found


def _at_most(limit: int, count: Ranks) -> Ranks:
    return where(count < limit, count, limit)


def heaviest(size: int) -> int:
    """The most chunks of any subtree but the root's: max(h/2, p-h), h the power of two below p."""
    half = 1 << (size - 1).bit_length() >> 1
    return max(half // 2, size - half) if size > 1 else 0
