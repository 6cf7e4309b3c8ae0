"""Ring allreduce: every chunk visits each rank once to be summed and once to be copied.

      0 -> 1          p-1 rounds of reduce-scatter, then p-1 rounds of allgather.
      ^    |          Each rank sends 2 (p-1)/p n bytes in 2 (p-1) messages
      3 <- 2          and reduces (p-1)/p n bytes.

Patarasuk & Yuan 2009.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import (
    Algorithm,
    Cost,
    Ranks,
    Receive,
    Reduce,
    Round,
    Send,
    one_per_rank,
)


def allreduce_ring(rank: Ranks, size: int) -> Iterator[Round]:
    right, left = (rank + 1) % size, (rank - 1) % size
    for step in range(size - 1):
        yield Round(
            Send(chunk=(rank - step) % size, to=right),
            Reduce(chunk=(rank - step - 1) % size, source=left),
        )
    # Now chunk rank + 1 is complete here, and goes round once more.
    for step in range(size - 1):
        yield Round(
            Send(chunk=(rank + 1 - step) % size, to=right),
            Receive(chunk=(rank - step) % size, source=left),
        )


def cost(size: int) -> Cost:
    once_round = Fraction(size - 1, size)
    return Cost(rounds=2 * (size - 1), sent=2 * once_round, reduced=once_round)


ALLREDUCE_RING = Algorithm(allreduce_ring, one_per_rank, cost)
