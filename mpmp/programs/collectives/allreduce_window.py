"""Allreduce in shared windows: each rank sums its own chunk where it lies, and stores it to all.

      window 0  [a0|b0]     rank 0: a0+a1 -> both windows     2 waits for one another. Each rank
      window 1  [a1|b1]     rank 1: b0+b1 -> both windows     reads n and writes n bytes, whatever
                                                              p is: nothing is copied in or out.

The same two halves as reduce-scatter and allgather (Patarasuk and Yuan 2009) in one pass; sums are
in rank order, so every size and every rank gets the same bits.
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


def allreduce_window(rank: Ranks, size: int) -> Iterator[WindowStep]:
    yield Publish()
    yield Await(ALL)
    yield Combine(chunk=rank, sum_from=ALL, store_to=ALL)
    yield Publish()
    yield Await(ALL)


def cost(size: int) -> WindowCost:
    return WindowCost(syncs=2, read=Fraction(1), written=Fraction(1))


ALLREDUCE_WINDOW = WindowAlgorithm(allreduce_window, one_per_rank, cost)
