"""Barrier in shared windows: everybody says that it is there, and waits for all.

line 0  [published 7]     1 wait; nothing is read or written but the lines on which the
line 1  [published 7]     ranks publish.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Ranks, whole
from mpmp.programs.windows import ALL, Await, Publish, WindowAlgorithm, WindowCost, WindowStep


def barrier_window(rank: Ranks, size: int) -> Iterator[WindowStep]:
    yield Publish()
    yield Await(ALL)


def cost(size: int) -> WindowCost:
    return WindowCost(syncs=1, read=Fraction(0), written=Fraction(0))


BARRIER_WINDOW = WindowAlgorithm(barrier_window, whole, cost)
