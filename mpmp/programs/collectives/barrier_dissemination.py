"""Dissemination barrier: tell the rank 1, 2, 4, ... further on of whom one has heard.

      0 -> 1 -> 2 -> 3 -> 4 -> 0     ceil(lg p) rounds of a byte. After round k a rank has heard of
      0 -> 2, 1 -> 3, 2 -> 4, ...    the 2^(k+1) ranks before it; of some twice where p is no
      0 -> 4, 1 -> 0, 2 -> 1, ...    power of two, which does no harm.

Hensgen, Finkel, Manber 1988.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Algorithm, Cost, Ranks, Reduce, Round, Send, whole


def barrier_dissemination(rank: Ranks, size: int) -> Iterator[Round]:
    for bit in range((size - 1).bit_length()):
        distance = 1 << bit
        yield Round(
            Send(chunk=0, to=(rank + distance) % size),
            Reduce(chunk=0, source=(rank - distance) % size),
        )


def cost(size: int) -> Cost:
    rounds = (size - 1).bit_length()
    return Cost(rounds, sent=Fraction(rounds), reduced=Fraction(rounds))


BARRIER_DISSEMINATION = Algorithm(barrier_dissemination, whole, cost)
