"""Recursive halving reduce-scatter: give away half of what is left, at distance p/2, ..., 2, 1.

      0 1 2 3         lg p rounds. Rank 0 swaps with 2 and keeps chunks 0 1,
      0---2, 1---3    then with 1 and keeps chunk 0.
      0-1 2-3         Each rank sends and reduces (p-1)/p n bytes.
                      A size that is no power of two is folded first: the upper rank of a pair
                      gives its whole vector to the lower one, which halves for both and hands
                      back one chunk: floor(lg p) + 2 rounds, n bytes sent; the lower receives
                      and reduces n bytes more than its halves, of which rank 0 keeps the heaviest.

Thakur, Rabenseifner, Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.fold import Fold
from mpmp.programs.steps import (
    Algorithm,
    Cost,
    Ranks,
    Receive,
    Reduce,
    Round,
    Send,
    one_per_rank,
)


def reduce_scatter_recursive_halving(rank: Ranks, size: int) -> Iterator[Round]:
    fold = Fold(rank, size)
    if fold.surplus:
        yield Round(Send(0, to=fold.lower, count=size), Reduce(0, source=fold.upper, count=size))
    for distance in reversed(fold.distances):
        partner = fold.partner(distance)
        keep, num_keep = fold.block(fold.virtual, distance)
        give, num_give = fold.block(fold.virtual ^ distance, distance)
        yield Round(
            Send(give, to=partner, count=num_give), Reduce(keep, source=partner, count=num_keep)
        )
    if fold.surplus:
        yield Round(Send(fold.upper, to=fold.upper), Receive(rank, source=fold.lower))


def cost(size: int) -> Cost:
    fold = Fold(0, size)
    kept = sum(fold.block(0, distance)[1] for distance in fold.distances)
    folded = size if fold.surplus else 0
    return Cost(
        rounds=fold.num_rounds,
        sent=Fraction(size if fold.surplus else size - 1, size),
        reduced=Fraction(folded + kept, size),
        received=Fraction(folded + kept, size),
    )


REDUCE_SCATTER_RECURSIVE_HALVING = Algorithm(reduce_scatter_recursive_halving, one_per_rank, cost)
