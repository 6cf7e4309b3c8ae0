"""Ring allgather: every rank hands on what it got last.

      0 -> 1          p-1 rounds. Chunk c starts at rank c and travels once round.
      ^    |          Each rank sends (p-1)/p n bytes.
      3 <- 2

Patarasuk and Yuan 2009.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Round, Send, one_per_rank


def allgather_ring(rank: Ranks, size: int) -> Iterator[Round]:
    right, left = (rank + 1) % size, (rank - 1) % size
    for step in range(size - 1):
        yield Round(
            Send(chunk=(rank - step) % size, to=right),
            Receive(chunk=(rank - step - 1) % size, source=left),
        )


def cost(size: int) -> Cost:
    return Cost(rounds=size - 1, sent=Fraction(size - 1, size))


ALLGATHER_RING = Algorithm(allgather_ring, one_per_rank, cost)
