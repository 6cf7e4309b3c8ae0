"""Rabenseifner's allreduce: a reduce-scatter by recursive halving, an allgather by doubling.

      0 1 2 3         2 lg p rounds. Each rank sends 2 (p-1)/p n bytes and reduces (p-1)/p n:
      0---2, 1---3    the bytes of a ring in few rounds.
      0-1 2-3         A size that is no power of two is folded onto p', the one below it, and the
      0-1 2-3         buffer is cut into p' chunks: 2 floor(lg p) + 2 rounds, 2 (p'-1)/p' n + n
      0---2, 1---3    bytes sent and (p'-1)/p' n + n reduced by the lower rank of a pair.

Rabenseifner 2004; Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.allgather_recursive_doubling import allgather_recursive_doubling
from mpmp.programs.collectives.fold import folded, folded_cost, speakers
from mpmp.programs.collectives.reduce_scatter_recursive_halving import (
    reduce_scatter_recursive_halving,
)
from mpmp.programs.steps import Algorithm, Cost, Ranks, Round


def _halving_and_doubling(rank: Ranks, size: int) -> Iterator[Round]:
    yield from reduce_scatter_recursive_halving(rank, size)
    yield from allgather_recursive_doubling(rank, size)


def allreduce_rabenseifner(rank: Ranks, size: int) -> Iterator[Round]:
    yield from folded(rank, size, _halving_and_doubling, speakers(size))


def _power_of_two_cost(size: int) -> Cost:
    all_but_one = Fraction(size - 1, size)
    return Cost(2 * (size.bit_length() - 1), sent=2 * all_but_one, reduced=all_but_one)


def cost(size: int) -> Cost:
    return folded_cost(size, _power_of_two_cost)


ALLREDUCE_RABENSEIFNER = Algorithm(allreduce_rabenseifner, speakers, cost)
