"""Ring reduce-scatter: the partial sum of a chunk travels once round and ends where it belongs.

      0 -> 1          p-1 rounds. Chunk c starts at rank c+1, every rank it visits adds its own,
      ^    |          and rank c adds the last.
      3 <- 2          Each rank sends and reduces (p-1)/p n bytes.

Patarasuk & Yuan 2009.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Algorithm, Cost, Ranks, Reduce, Round, Send, one_per_rank


def reduce_scatter_ring(rank: Ranks, size: int) -> Iterator[Round]:
    right, left = (rank + 1) % size, (rank - 1) % size
    for step in range(size - 1):
        yield Round(
            Send(chunk=(rank - step - 1) % size, to=right),
            Reduce(chunk=(rank - step - 2) % size, source=left),
        )


def cost(size: int) -> Cost:
    once_round = Fraction(size - 1, size)
    return Cost(rounds=size - 1, sent=once_round, reduced=once_round)


REDUCE_SCATTER_RING = Algorithm(reduce_scatter_ring, one_per_rank, cost)
