"""Pairwise all-to-all: in round k everybody sends to the rank k further on.

      0 -> 1 -> 2 -> 3 -> 0     p-1 rounds. Each rank sends (p-1)/p n bytes, all it has for others,
      0 -> 2, 1 -> 3, ...       straight to where they belong: for long vectors, and for counts
      0 -> 3 -> 2 -> 1 -> 0     that differ.

Thakur, Rabenseifner, Gropp 2005 (who count the own piece too).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Round, Send


def alltoall_pairwise(rank: Ranks, size: int) -> Iterator[Round]:
    for shift in range(1, size):
        to, source = (rank + shift) % size, (rank - shift) % size
        yield Round(Send(chunk=to, to=to), Receive(chunk=size + source, source=source))


def input_and_output(size: int) -> int:
    """Chunk q of the input goes to rank q, chunk p + q of the output comes from it."""
    return 2 * size


def cost(size: int) -> Cost:
    return Cost(rounds=size - 1, sent=Fraction(size - 1, size))


ALLTOALL_PAIRWISE = Algorithm(alltoall_pairwise, input_and_output, cost)
