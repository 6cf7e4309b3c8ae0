"""Allgather in shared windows: each rank fetches the others' chunks out of their windows.

      window 0  [a |  ]     rank 0: b -> window 0     2 waits: until all chunks are there, and until
      window 1  [  | b]     rank 1: a -> window 1     nobody reads any more.
                                                      Each rank reads and writes (p-1)/p n bytes.

Every rank begins with the chunk after its own, so that no window is read by all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Ranks, one_per_rank
from mpmp.programs.windows import (
    ALL,
    Await,
    Combine,
    Publish,
    WindowAlgorithm,
    WindowCost,
    WindowStep,
)


def allgather_window(rank: Ranks, size: int) -> Iterator[WindowStep]:
    yield Publish()
    yield Await(ALL)
    for step in range(1, size):
        other = (rank + step) % size
        yield Combine(chunk=other, sum_from=other, store_to=rank)
    yield Publish()
    yield Await(ALL)


def cost(size: int) -> WindowCost:
    others = Fraction(size - 1, size)
    return WindowCost(syncs=2, read=others, written=others)


ALLGATHER_WINDOW = WindowAlgorithm(allgather_window, one_per_rank, cost)
