"""Binomial tree scatter: a gather backwards; whoever has chunks of many gives half of them away.

      0 ------> 4     ceil(lg p) rounds, counted from the root. It gives chunks 4-7 to 4, then
      0 -> 2  4 -> 6  2-3 to 2, then 1 to 1: (p-1)/p n bytes sent. The most that another rank
      01  23  45  67  receives is a subtree, max(h/2, p-h)/p n, h the power of two below p.

Chunk r goes to rank r whatever the root is. Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.subtree import edges, heaviest
from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Round, Send, one_per_rank


def scatter_binomial(rank: Ranks, size: int, *, root: int = 0) -> Iterator[Round]:
    for edge in reversed(edges(rank, size, root)):
        yield Round(
            *(Send(*span) for span in edge.with_child),
            *(Receive(*span) for span in edge.with_parent),
        )


def cost(size: int, *, root: int = 0) -> Cost:
    return Cost(
        (size - 1).bit_length(),
        sent=Fraction(size - 1, size),
        received=Fraction(heaviest(size), size),
    )


SCATTER_BINOMIAL = Algorithm(scatter_binomial, one_per_rank, cost, facts=("root",))
