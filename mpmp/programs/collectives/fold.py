"""Fold: a group of any size seen as one whose size is a power of two.

    ranks     0 1   2 3   4   5      size 6: the first 2 x surplus ranks pair up,
              |/    |/    |   |      and the lower of a pair speaks for both.
    virtual    0     1    2   3      A pair holds two chunks, so that virtual neighbours
    chunks    0 1   2 3   4   5      own neighbouring chunks.

Costs one round before and one round after. Thakur, Rabenseifner, Gropp 2005, section 4.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from mpmp.programs.collectives.compose import Members, Program, on
from mpmp.programs.steps import NONE, Cost, Ranks, Receive, Reduce, Round, Send, where


class Fold:
    """Where ``rank`` stands in the folded group of ``size`` ranks."""

    def __init__(self, rank: Ranks, size: int) -> None:
        self.distances = [1 << bit for bit in range(size.bit_length() - 1)]
        self.surplus = size - (1 << len(self.distances))
        paired = rank < 2 * self.surplus
        self.virtual = where(paired, rank // 2, rank - self.surplus)
        # The peer that speaks for this rank, and the peer this rank speaks for.
        self.lower = where(paired & (rank % 2 == 1), rank - 1, NONE)
        self.upper = where(paired & (rank % 2 == 0), rank + 1, NONE)

    @property
    def num_rounds(self) -> int:
        """One round for each distance, and where ranks are folded one before and one after."""
        return len(self.distances) + (2 if self.surplus else 0)

    @property
    def speakers(self) -> Members:
        """The ranks that speak for themselves or for a pair."""
        place = where(self.lower == NONE, self.virtual, NONE)
        return Members(place, 1 << len(self.distances), self.first)

    def first(self, virtual: Ranks) -> Ranks:
        """The rank that speaks for ``virtual``, which is its first chunk as well."""
        return virtual + where(virtual < self.surplus, virtual, self.surplus)

    def partner(self, distance: int) -> Ranks:
        """The peer across ``distance`` virtual ranks; a rank that was folded away has none."""
        return where(self.lower == NONE, self.first(self.virtual ^ distance), NONE)

    def block(self, virtual: Ranks, length: int) -> tuple[Ranks, Ranks]:
        """First chunk and number of chunks of the aligned ``length`` virtual ranks around one."""
        start = virtual & -length
        chunk = self.first(start)
        return chunk, self.first(start + length) - chunk


def speakers(size: int, **facts: Any) -> int:
    """The buffer is cut into as many chunks as there are speakers: a power of two."""
    return 1 << (size.bit_length() - 1)


def folded(rank: Ranks, size: int, allreduce: Program, num_chunks: int) -> Iterator[Round]:
    """An allreduce for powers of two on any size: the upper rank of a pair gives all n bytes to
    the lower one and gets the result back."""
    fold = Fold(rank, size)
    if fold.surplus:
        yield Round(
            Send(0, to=fold.lower, count=num_chunks),
            Reduce(0, source=fold.upper, count=num_chunks),
        )
    yield from on(fold.speakers, allreduce)
    if fold.surplus:
        yield Round(
            Send(0, to=fold.upper, count=num_chunks),
            Receive(0, source=fold.lower, count=num_chunks),
        )


def folded_cost(size: int, cost: Callable[[int], Cost]) -> Cost:
    """That of a power of two, and n more for the lower of a pair to take, combine and send."""
    fold, inner = Fold(0, size), cost(speakers(size))
    once = Fraction(1 if fold.surplus else 0)
    return Cost(
        rounds=inner.rounds + 2 * int(once),
        sent=inner.sent + once,
        reduced=inner.reduced + once,
        received=inner.received + once,
    )
