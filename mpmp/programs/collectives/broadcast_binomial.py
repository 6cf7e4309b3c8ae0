"""Binomial tree broadcast: whoever has the data gives it to the rank half as far away as before.

      0 ------> 4     ceil(lg p) rounds, counted from the root. Far ranks first, so that on
      0 -> 2  4 -> 6  hosts filled in order the last and widest rounds stay inside a host.
      01  23  45  67  The root sends n bytes in every round.

Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import (
    NONE,
    Algorithm,
    Cost,
    Ranks,
    Receive,
    Round,
    Send,
    where,
    whole,
)


def broadcast_binomial(rank: Ranks, size: int, *, root: int = 0) -> Iterator[Round]:
    place = (rank - root) % size
    for bit in reversed(range((size - 1).bit_length())):
        distance = 1 << bit
        gives = (place % (2 * distance) == 0) & (place + distance < size)
        takes = place % (2 * distance) == distance
        yield Round(
            Send(chunk=0, to=where(gives, (rank + distance) % size, NONE)),
            Receive(chunk=0, source=where(takes, (rank - distance) % size, NONE)),
        )


def cost(size: int, *, root: int = 0) -> Cost:
    rounds = (size - 1).bit_length()
    return Cost(rounds=rounds, sent=Fraction(rounds), received=Fraction(min(rounds, 1)))


BROADCAST_BINOMIAL = Algorithm(broadcast_binomial, whole, cost, facts=("root",))
