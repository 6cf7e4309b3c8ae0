"""Bruck all-to-all: a piece that must go i ranks further goes 1, 2, 4, ... as the bits of i say.

      slot     1 2 3 4 5 6 7      ceil(lg p) rounds. In round k all slots whose number has bit k
      + 1      x   x   x   x      go 2^k ranks further, as one message; each rank sends
      + 2        x x     x x      lg p n/2 bytes where p is a power of two, else the bits of
      + 4            x x x x      0..p-1 all counted, over p, times n. For short vectors.

Slot i of rank r is on its way from r - i in the end, so it lives in that output chunk; the first
time it leaves straight from the input, and nothing is turned round before or after. Pieces of
others pass through, so all counts must be equal.

Bruck, Ho, Kipnis, Upfal, Weathersby 1997.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.alltoall_pairwise import input_and_output
from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Round, Send


def alltoall_bruck(rank: Ranks, size: int) -> Iterator[Round]:
    for bit in range((size - 1).bit_length()):
        distance = 1 << bit
        to, source = (rank + distance) % size, (rank - distance) % size
        slots = [slot for slot in range(1, size) if slot & distance]
        yield Round(
            *(Send(lies(rank, slot, distance, size), to) for slot in slots),
            *(Receive(size + (rank - slot) % size, source) for slot in slots),
        )


def lies(rank: Ranks, slot: int, distance: int, size: int) -> Ranks:
    """The chunk that a slot is in: of the input before its first way, which its lowest bit is."""
    first = slot & -slot == distance
    return (rank + slot) % size if first else size + (rank - slot) % size


def cost(size: int) -> Cost:
    ways = sum(slot.bit_count() for slot in range(size))
    return Cost((size - 1).bit_length(), sent=Fraction(ways, size))


ALLTOALL_BRUCK = Algorithm(alltoall_bruck, input_and_output, cost)
