"""Recursive doubling allgather: swap all that is known with the rank at distance 1, 2, 4, ...

      0 1 2 3         lg p rounds. Rank 0 swaps with 1 and knows chunks 0 1,
      0-1 2-3         then with 2 and knows all four.
      0---2, 1---3    Each rank sends (p-1)/p n bytes.
                      A size that is no power of two is folded first: the upper rank of a pair
                      gives its chunk to the lower one and gets all n bytes at the end,
                      floor(lg p) + 2 rounds; rank 0 sends the heaviest blocks and n bytes
                      more, the upper rank receives n.

Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.fold import Fold
from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Round, Send, one_per_rank


def allgather_recursive_doubling(rank: Ranks, size: int) -> Iterator[Round]:
    fold = Fold(rank, size)
    if fold.surplus:
        yield Round(Send(rank, to=fold.lower), Receive(fold.upper, source=fold.upper))
    for distance in fold.distances:
        partner = fold.partner(distance)
        known, num_known = fold.block(fold.virtual, distance)
        other, num_other = fold.block(fold.virtual ^ distance, distance)
        yield Round(
            Send(known, to=partner, count=num_known),
            Receive(other, source=partner, count=num_other),
        )
    if fold.surplus:
        yield Round(Send(0, to=fold.upper, count=size), Receive(0, source=fold.lower, count=size))


def cost(size: int) -> Cost:
    fold = Fold(0, size)
    known = sum(fold.block(0, distance)[1] for distance in fold.distances)
    handed_back = size if fold.surplus else 0
    return Cost(
        rounds=fold.num_rounds,
        sent=Fraction(known + handed_back, size),
        received=Fraction(size if fold.surplus else size - 1, size),
    )


ALLGATHER_RECURSIVE_DOUBLING = Algorithm(allgather_recursive_doubling, one_per_rank, cost)
