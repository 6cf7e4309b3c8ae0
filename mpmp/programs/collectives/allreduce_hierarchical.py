"""Hierarchical allreduce: first inside the hosts, then between them, then inside again.

      host 0    host 1     m ranks on each of h hosts: a reduce-scatter inside (halving where m is
      0 - 1     2 - 3      a power of two, else a ring), Rabenseifner's allreduce between the ranks
      |   |     |   |      with the same place, each on n/m, and an allgather inside.
      +---|-----+   |      Where h is a power of two each rank sends 2 (p-1)/p n bytes in all, of
          +---------+      these only 2 (h-1)/h n/m to other hosts, and reduces (p-1)/p n.

Hosts with different numbers of ranks: a binomial reduce to the first rank of each, Rabenseifner's
allreduce between these, a binomial broadcast inside. The first rank of the fullest host, M ranks,
does most: it sends, receives and reduces ceil(lg M) n more than Rabenseifner's costs on h ranks.

The fact ``hosts`` gives each rank's host; without it all are on one. Costs of the stages add up.
Where the ranks of a host share memory, comm/bridge.py does the first and the last part in windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from mpmp.programs.collectives import (
    allgather_recursive_doubling,
    allgather_ring,
    allreduce_rabenseifner,
    broadcast_binomial,
    reduce_binomial,
    reduce_scatter_recursive_halving,
    reduce_scatter_ring,
)
from mpmp.programs.collectives.compose import is_power_of_two, on
from mpmp.programs.collectives.fold import speakers
from mpmp.programs.collectives.hosts import Hosts
from mpmp.programs.steps import Algorithm, Cost, Ranks, Round

HALVING = reduce_scatter_recursive_halving.REDUCE_SCATTER_RECURSIVE_HALVING
DOUBLING = allgather_recursive_doubling.ALLGATHER_RECURSIVE_DOUBLING
RINGS = reduce_scatter_ring.REDUCE_SCATTER_RING, allgather_ring.ALLGATHER_RING
NOTHING = Fraction(0)
BETWEEN = allreduce_rabenseifner.ALLREDUCE_RABENSEIFNER


def allreduce_hierarchical(
    rank: Ranks, size: int, *, hosts: tuple[int, ...] = ()
) -> Iterator[Round]:
    on_hosts = Hosts(rank, size, hosts)
    width = speakers(on_hosts.number)
    inside, between, leaders = on_hosts.inside, on_hosts.between, on_hosts.leaders
    if on_hosts.are_even:
        scatter, gather = inside_hosts(on_hosts.most)
        yield from on(inside, scatter.program, width=width)
        yield from on(between, BETWEEN.program, first=on_hosts.place * width)
        yield from on(inside, gather.program, width=width)
    else:
        yield from on(inside, reduce_binomial.reduce_binomial, width=width)
        yield from on(leaders, BETWEEN.program)
        yield from on(inside, broadcast_binomial.broadcast_binomial, width=width)


def inside_hosts(size: int) -> tuple[Algorithm, Algorithm]:
    """Reduce-scatter and allgather that send (m-1)/m n, in the fewest rounds that do."""
    return (HALVING, DOUBLING) if is_power_of_two(size) else RINGS


def num_chunks(size: int, *, hosts: tuple[int, ...] = ()) -> int:
    on_hosts = Hosts(0, size, hosts)
    return speakers(on_hosts.number) * (on_hosts.most if on_hosts.are_even else 1)


def cost(size: int, *, hosts: tuple[int, ...] = ()) -> Cost:
    on_hosts = Hosts(0, size, hosts)
    between = BETWEEN.cost(on_hosts.number)
    if on_hosts.are_even:
        up, down = (one.cost(on_hosts.most) for one in inside_hosts(on_hosts.most))
        share = on_hosts.most
    else:
        # The leader sends nothing on the way up and receives nothing on the way down.
        up, down = reduce_binomial.cost(on_hosts.most), broadcast_binomial.cost(on_hosts.most)
        up, down = replace(up, sent=NOTHING), replace(down, received=NOTHING)
        share = 1
    return Cost(
        rounds=up.rounds + between.rounds + down.rounds,
        sent=up.sent + between.sent / share + down.sent,
        reduced=up.reduced + between.reduced / share,
        received=up.received + between.received / share + down.received,
    )


ALLREDUCE_HIERARCHICAL = Algorithm(allreduce_hierarchical, num_chunks, cost, facts=("hosts",))
