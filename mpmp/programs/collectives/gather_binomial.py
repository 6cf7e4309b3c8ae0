"""Binomial tree gather: every rank gives all it has collected to its parent, neighbours first.

      01  23  45  67    ceil(lg p) rounds, counted from the root: 1 gives chunk 1 to 0, then 2 gives
      0 <- 2  4 <- 6    2-3, then 4 gives 4-7. The root receives (p-1)/p n bytes; the most that
      0 <------ 4       any rank sends is a subtree, max(h/2, p-h)/p n, h the power of two below p.

Chunk r comes from rank r whatever the root is. Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.subtree import edges, heaviest
from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Round, Send, one_per_rank


def gather_binomial(rank: Ranks, size: int, *, root: int = 0) -> Iterator[Round]:
    for edge in edges(rank, size, root):
        yield Round(
            *(Send(*span) for span in edge.with_parent),
            *(Receive(*span) for span in edge.with_child),
        )


def cost(size: int, *, root: int = 0) -> Cost:
    return Cost(
        (size - 1).bit_length(),
        sent=Fraction(heaviest(size), size),
        received=Fraction(size - 1, size),
    )


GATHER_BINOMIAL = Algorithm(gather_binomial, one_per_rank, cost, facts=("root",))
