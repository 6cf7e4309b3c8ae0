"""Direct reduce-scatter: everybody sends chunk q to rank q at once, which sums in rank order.

      0 - 1       1 round of p-1 messages each way.
      | x |       Each rank sends and reduces (p-1)/p n bytes. Whatever p is, the sum is
      3 - 2       ((r0 + r1) + r2) + ..., with the bits of a sum on one rank: order = "fixed".

MPICH's pairwise exchange (Thakur, Rabenseifner, Gropp 2005) with all rounds at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Algorithm, Cost, Ranks, Reduce, Round, Send, one_per_rank


def reduce_scatter_direct(rank: Ranks, size: int) -> Iterator[Round]:
    # Everybody begins with the next rank, so that nobody is sent to by all first.
    others = [(rank + shift) % size for shift in range(1, size)]
    if others:
        yield Round(
            *(Send(other, to=other) for other in others),
            *(Reduce(rank, source=other) for other in reversed(others)),
        )


def cost(size: int) -> Cost:
    all_but_one = Fraction(size - 1, size)
    return Cost(min(size - 1, 1), sent=all_but_one, reduced=all_but_one)


REDUCE_SCATTER_DIRECT = Algorithm(reduce_scatter_direct, one_per_rank, cost, fixed_order=True)
