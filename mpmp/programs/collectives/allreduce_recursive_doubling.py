"""Recursive doubling allreduce: swap everything with the rank at distance 1, 2, 4, ...

      0 1 2 3         lg p rounds; each rank sends and reduces n bytes in each.
      0-1 2-3         The fewest rounds there are: for short vectors.
      0---2, 1---3    A size that is no power of two is folded first: the upper rank of a pair
                      gives its vector to the lower one and gets the result back,
                      floor(lg p) + 2 rounds, n more bytes.

Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.fold import Fold
from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Reduce, Round, Send, whole


def allreduce_recursive_doubling(rank: Ranks, size: int) -> Iterator[Round]:
    fold = Fold(rank, size)
    if fold.surplus:
        yield Round(Send(chunk=0, to=fold.lower), Reduce(chunk=0, source=fold.upper))
    for distance in fold.distances:
        partner = fold.partner(distance)
        yield Round(Send(chunk=0, to=partner), Reduce(chunk=0, source=partner))
    if fold.surplus:
        yield Round(Send(chunk=0, to=fold.upper), Receive(chunk=0, source=fold.lower))


def cost(size: int) -> Cost:
    fold = Fold(0, size)
    vectors = Fraction(len(fold.distances) + (1 if fold.surplus else 0))
    return Cost(rounds=fold.num_rounds, sent=vectors, reduced=vectors)


ALLREDUCE_RECURSIVE_DOUBLING = Algorithm(allreduce_recursive_doubling, whole, cost)
