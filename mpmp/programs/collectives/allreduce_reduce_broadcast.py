"""Reduce and broadcast: a binomial tree up to rank 0 and down again.

      01  23  45  67    2 ceil(lg p) rounds. Rank 0 receives and reduces ceil(lg p) n bytes on the
      0 <- 2  4 <- 6    way up and sends as many on the way down: simple, and for long vectors
      0 <-----> 4       the slowest of all.
      0 -> 2  4 -> 6
      01  23  45  67

Open MPI's "nonoverlapping".
"""

from __future__ import annotations

from collections.abc import Iterator

from mpmp.programs.collectives import broadcast_binomial, reduce_binomial
from mpmp.programs.steps import Algorithm, Cost, Ranks, Round, whole


def allreduce_reduce_broadcast(rank: Ranks, size: int) -> Iterator[Round]:
    yield from reduce_binomial.reduce_binomial(rank, size)
    yield from broadcast_binomial.broadcast_binomial(rank, size)


def cost(size: int) -> Cost:
    up, down = reduce_binomial.cost(size), broadcast_binomial.cost(size)
    # Rank 0 is the busiest on both ways: it sends nothing up and receives nothing down.
    return Cost(up.rounds + down.rounds, down.sent, up.reduced, up.received)


ALLREDUCE_REDUCE_BROADCAST = Algorithm(allreduce_reduce_broadcast, whole, cost)
