"""Reduce-scatter in shared windows: each rank sums its own chunk out of all windows into its own.

      window 0  [a0|b0]     rank 0: a0+a1 -> window 0     2 waits: before the sum, and until nobody
      window 1  [a1|b1]     rank 1: b0+b1 -> window 1     reads any more. Reads n, writes n/p bytes.

Sums are in rank order.
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


def reduce_scatter_window(rank: Ranks, size: int) -> Iterator[WindowStep]:
    yield Publish()
    yield Await(ALL)
    yield Combine(chunk=rank, sum_from=ALL, store_to=rank)
    yield Publish()
    yield Await(ALL)


def cost(size: int) -> WindowCost:
    return WindowCost(syncs=2, read=Fraction(1), written=Fraction(1, size))


REDUCE_SCATTER_WINDOW = WindowAlgorithm(reduce_scatter_window, one_per_rank, cost)
