"""Pipelined chain broadcast: the buffer goes from rank to rank in segments, all links at work.

      0 -> 1 -> 2 -> 3      p - 2 + S rounds of n/S bytes; each rank sends and receives n bytes,
      2    1    0           so long vectors take little more than once over a link, however many
      3    2    1    0      ranks there are. S, the fact ``segments``, is best near
                            sqrt((p-2) n beta / alpha).

Pjesivac-Grbovic et al. 2007 (Open MPI's "pipeline").
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import NONE, Algorithm, Cost, Ranks, Receive, Round, Send, where


def broadcast_chain(rank: Ranks, size: int, *, root: int = 0, segments: int = 1) -> Iterator[Round]:
    place = (rank - root) % size
    for number in range(cost(size, segments=segments).rounds):
        gives, takes = number - place, number - place + 1
        has_next = (place < size - 1) & (gives >= 0) & (gives < segments)
        has_last = (place > 0) & (takes >= 0) & (takes < segments)
        yield Round(
            Send(gives, to=where(has_next, (rank + 1) % size, NONE)),
            Receive(takes, source=where(has_last, (rank - 1) % size, NONE)),
        )


def num_chunks(size: int, *, root: int = 0, segments: int = 1) -> int:
    return segments


def cost(size: int, *, root: int = 0, segments: int = 1) -> Cost:
    rounds = size - 2 + segments if size > 1 else 0
    return Cost(rounds, sent=Fraction(min(size - 1, 1)))


BROADCAST_CHAIN = Algorithm(broadcast_chain, num_chunks, cost, facts=("root", "segments"))
