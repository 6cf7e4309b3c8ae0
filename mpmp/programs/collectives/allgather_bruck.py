"""Bruck allgather: everybody gives all it knows to the rank 1, 2, 4, ... before it.

      rank 0 knows  0        ceil(lg p) rounds for every p: the fewest there are. Rank r knows the
      0 <- 1        0 1      2^k chunks from r on, in a circle; the last round gives what is left.
      0 <- 2        0 1 2 3  Each rank sends (p-1)/p n bytes. Chunks lie where they end from the
      0 <- 4        0 ... 7  start, so nothing is turned round at the end.

Bruck, Ho, Kipnis, Upfal, Weathersby 1997.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.compose import cyclic
from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Round, Send, one_per_rank


def allgather_bruck(rank: Ranks, size: int) -> Iterator[Round]:
    for bit in range((size - 1).bit_length()):
        distance = 1 << bit
        to, source = (rank - distance) % size, (rank + distance) % size
        count = min(distance, size - distance)
        yield Round(
            *(Send(*span) for span in cyclic(rank, count, size, to)),
            *(Receive(*span) for span in cyclic(source, count, size, source)),
        )


def cost(size: int) -> Cost:
    return Cost((size - 1).bit_length(), sent=Fraction(size - 1, size))


ALLGATHER_BRUCK = Algorithm(allgather_bruck, one_per_rank, cost)
