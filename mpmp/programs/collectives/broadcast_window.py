"""Broadcast in shared windows: everybody copies out of the root's window.

window 0  [a]          2 waits: until all are there, and until nobody reads any more.
   |    \\              Each rank but the root reads and writes n bytes; the root none.
window 1  window 2
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import NONE, Ranks, where, whole
from mpmp.programs.windows import (
    ALL,
    Await,
    Combine,
    Publish,
    WindowAlgorithm,
    WindowCost,
    WindowStep,
)


def broadcast_window(rank: Ranks, size: int, *, root: int = 0) -> Iterator[WindowStep]:
    yield Publish()
    yield Await(ALL)
    yield Combine(chunk=0, sum_from=root, store_to=where(rank == root, NONE, rank))
    yield Publish()
    yield Await(ALL)


def cost(size: int, *, root: int = 0) -> WindowCost:
    copied = Fraction(1 if size > 1 else 0)
    return WindowCost(syncs=2, read=copied, written=copied)


BROADCAST_WINDOW = WindowAlgorithm(broadcast_window, whole, cost, facts=("root",))
