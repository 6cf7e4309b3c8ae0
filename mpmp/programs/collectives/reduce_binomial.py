"""Binomial tree reduce: a broadcast backwards, neighbours first.

      01  23  45  67    ceil(lg p) rounds, counted from the root: 1 gives to 0, then 2, then 4.
      0 <- 2  4 <- 6    The root receives and reduces n bytes in every round, the others send n
      0 <------ 4       bytes once.

Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import NONE, Algorithm, Cost, Ranks, Reduce, Round, Send, where, whole


def reduce_binomial(rank: Ranks, size: int, *, root: int = 0) -> Iterator[Round]:
    place = (rank - root) % size
    for bit in range((size - 1).bit_length()):
        distance = 1 << bit
        gives = place % (2 * distance) == distance
        takes = (place % (2 * distance) == 0) & (place + distance < size)
        yield Round(
            Send(chunk=0, to=where(gives, (rank - distance) % size, NONE)),
            Reduce(chunk=0, source=where(takes, (rank + distance) % size, NONE)),
        )


def cost(size: int, *, root: int = 0) -> Cost:
    rounds = (size - 1).bit_length()
    return Cost(
        rounds, sent=Fraction(min(rounds, 1)), reduced=Fraction(rounds), received=Fraction(rounds)
    )


REDUCE_BINOMIAL = Algorithm(reduce_binomial, whole, cost, facts=("root",))
