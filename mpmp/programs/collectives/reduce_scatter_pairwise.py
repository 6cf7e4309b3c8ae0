"""Pairwise reduce-scatter: in round k everybody sends to the rank k further on what ends there.

      0 -> 1 -> 2 -> 3 -> 0     p-1 rounds. Rank r gets chunk r from r-1, r-2, ..., each as it
      0 -> 2, 1 -> 3, ...       was at the start: nothing waits for what another has summed.
      0 -> 3 -> 2 -> 1 -> 0     Each rank sends and reduces (p-1)/p n bytes.

Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Algorithm, Cost, Ranks, Reduce, Round, Send, one_per_rank


def reduce_scatter_pairwise(rank: Ranks, size: int) -> Iterator[Round]:
    for shift in range(1, size):
        to = (rank + shift) % size
        yield Round(Send(chunk=to, to=to), Reduce(chunk=rank, source=(rank - shift) % size))


def cost(size: int) -> Cost:
    all_but_one = Fraction(size - 1, size)
    return Cost(rounds=size - 1, sent=all_but_one, reduced=all_but_one)


REDUCE_SCATTER_PAIRWISE = Algorithm(reduce_scatter_pairwise, one_per_rank, cost)
