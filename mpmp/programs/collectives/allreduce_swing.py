"""Swing allreduce: halving and doubling with the ranks at distance 1, -1, 3, -5, 11, ...

      0 1 2 3 4 5 6 7     2 lg p rounds, 2 (p-1)/p n bytes sent, (p-1)/p n reduced: as
      0-1 2-3 4-5 6-7     Rabenseifner's, with peers about 2^(k+1)/3 away where those are 2^k:
      0-7 1-2 3-4 5-6     shorter ways on a ring or a torus. Odd ranks swing the other way.
      0-3 1-6 2-5 4-7     p = 8: the reduce-scatter; the allgather is the same backwards.
                          A size that is no power of two is folded, as in Rabenseifner's.

Who meets whom depends on the rank, not on its bits; the chunks that a rank is left with after k
rounds are those of all whom it can still reach. They are numbered so that they lie side by side.

De Sensi, Bonato, Saam, Hoefler, NSDI 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.fold import folded, folded_cost, speakers
from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Reduce, Round, Send, where


def reach(step: int) -> int:
    """How far the peer of an even rank is: 1, -1, 3, -5, 11, ..."""
    doubled: int = (-2) ** (step + 1)
    return (1 - doubled) // 3


def chunk_of(rank: Ranks, steps: int) -> Ranks:
    """The chunk that ends on ``rank``.

    Whoever meets only after step k shares ``rank // 2`` modulo 2^(k+1), when odd ranks are first
    moved onto their last peer: its bits from the lowest up tell the halves apart, then odd or even.
    """
    even = where(rank % 2 == 1, rank - reach(steps - 1), rank) // 2
    chunk = rank % 2
    for step in range(steps - 1):
        chunk = chunk + ((even >> step) % 2) * (1 << (steps - 1 - step))
    return chunk


def _swing(rank: Ranks, size: int) -> Iterator[Round]:
    steps = size.bit_length() - 1
    own, turn = chunk_of(rank, steps), where(rank % 2 == 1, -1, 1)
    pairs = [((rank + turn * reach(step)) % size, size >> (step + 1)) for step in range(steps)]
    for partner, length in pairs:
        keep, give = own & -length, (own ^ length) & -length
        yield Round(Send(give, to=partner, count=length), Reduce(keep, partner, count=length))
    for partner, length in reversed(pairs):
        known, other = own & -length, (own ^ length) & -length
        yield Round(Send(known, to=partner, count=length), Receive(other, partner, count=length))


def allreduce_swing(rank: Ranks, size: int) -> Iterator[Round]:
    yield from folded(rank, size, _swing, speakers(size))


def _power_of_two_cost(size: int) -> Cost:
    all_but_one = Fraction(size - 1, size)
    return Cost(2 * (size.bit_length() - 1), sent=2 * all_but_one, reduced=all_but_one)


def cost(size: int) -> Cost:
    return folded_cost(size, _power_of_two_cost)


ALLREDUCE_SWING = Algorithm(allreduce_swing, speakers, cost)
