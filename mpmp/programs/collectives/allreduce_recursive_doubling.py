"""Recursive doubling allreduce: swap everything with the rank at distance 1, 2, 4, ...

      0 1 2 3         lg p rounds; each rank sends and reduces n bytes in each.
      0-1 2-3         The fewest rounds there are: for short vectors.
      0---2, 1---3    A size that is no power of two is folded first: floor(lg p) + 2 rounds, and
                      n bytes more for the lower rank of a pair.

Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.fold import folded, folded_cost
from mpmp.programs.steps import Algorithm, Cost, Ranks, Reduce, Round, Send, whole


def _doubling(rank: Ranks, size: int) -> Iterator[Round]:
    for bit in range(size.bit_length() - 1):
        partner = rank ^ (1 << bit)
        yield Round(Send(chunk=0, to=partner), Reduce(chunk=0, source=partner))


def allreduce_recursive_doubling(rank: Ranks, size: int) -> Iterator[Round]:
    yield from folded(rank, size, _doubling, whole(size))


def _doubling_cost(size: int) -> Cost:
    rounds = size.bit_length() - 1
    return Cost(rounds, sent=Fraction(rounds), reduced=Fraction(rounds))


def cost(size: int) -> Cost:
    return folded_cost(size, _doubling_cost)


ALLREDUCE_RECURSIVE_DOUBLING = Algorithm(allreduce_recursive_doubling, whole, cost)
