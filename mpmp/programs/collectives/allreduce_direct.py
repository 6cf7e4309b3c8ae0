"""Direct allreduce: chunk q goes straight to rank q, which sums in rank order and sends it to all.

      0 - 1       2 rounds of p-1 messages each way at once.
      | x |       Each rank sends 2 (p-1)/p n bytes and reduces (p-1)/p n: the bytes of a ring, in
      3 - 2       p(p-1) messages a round where a ring has p. Whatever p is, the sum is
                  ((r0 + r1) + r2) + ..., with the bits of a sum on one rank: order = "fixed".

MPICH's pairwise exchange (Thakur, Rabenseifner, Gropp 2005), all rounds at once, there and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.reduce_scatter_direct import reduce_scatter_direct
from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Round, Send, one_per_rank


def allreduce_direct(rank: Ranks, size: int) -> Iterator[Round]:
    yield from reduce_scatter_direct(rank, size)
    others = [(rank + shift) % size for shift in range(1, size)]
    if others:
        yield Round(
            *(Send(rank, to=other) for other in others),
            *(Receive(other, source=other) for other in reversed(others)),
        )


def cost(size: int) -> Cost:
    all_but_one = Fraction(size - 1, size)
    return Cost(2 * min(size - 1, 1), sent=2 * all_but_one, reduced=all_but_one)


ALLREDUCE_DIRECT = Algorithm(allreduce_direct, one_per_rank, cost, fixed_order=True)
