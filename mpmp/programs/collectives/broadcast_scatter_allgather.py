"""Broadcast of long vectors: a binomial scatter from the root, then an allgather.

      0 ------> 4     2 lg p rounds where p is a power of two (recursive doubling), else
      0 -> 2  4 -> 6  ceil(lg p) + p - 1 (a ring). The root sends 2 (p-1)/p n bytes where the
      01  23  45  67  binomial tree sends lg p n; the heaviest subtree's rank receives most,
      01234567 <->    max(h/2, p-h)/p n in the scatter and (p-1)/p n after it, p > 1.

Van de Geijn; Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpmp.programs.collectives import (
    allgather_recursive_doubling,
    allgather_ring,
    scatter_binomial,
)
from mpmp.programs.collectives.compose import is_power_of_two
from mpmp.programs.steps import Algorithm, Cost, Ranks, Round, one_per_rank


def broadcast_scatter_allgather(rank: Ranks, size: int, *, root: int = 0) -> Iterator[Round]:
    yield from scatter_binomial.scatter_binomial(rank, size, root=root)
    if is_power_of_two(size):
        yield from allgather_recursive_doubling.allgather_recursive_doubling(rank, size)
    else:
        yield from allgather_ring.allgather_ring(rank, size)


def cost(size: int, *, root: int = 0) -> Cost:
    scatter = scatter_binomial.cost(size)
    allgather = (
        allgather_recursive_doubling.cost(size)
        if is_power_of_two(size)
        else allgather_ring.cost(size)
    )
    return Cost(
        rounds=scatter.rounds + allgather.rounds,
        sent=scatter.sent + allgather.sent,
        received=scatter.received + allgather.received,
    )


BROADCAST_SCATTER_ALLGATHER = Algorithm(
    broadcast_scatter_allgather, one_per_rank, cost, facts=("root",)
)
