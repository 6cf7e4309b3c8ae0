"""The words of a program: what one rank does in one round of a collective.

A *program* is a generator of rounds for one rank of one group. It speaks of peers (ranks of the
group) and of chunks (pieces of one buffer); how many elements a chunk holds is the plan's affair,
so uneven and empty chunks never appear here.

    def ring(rank, size):
        for step in range(size - 1):
            yield Round(Send(chunk=..., to=...), Reduce(chunk=..., source=...))

Rules of a round, the same for the checker, the simulator and the executor:

1. All sends read the buffer as it was when the round began.
2. Whatever arrives lands in scratch and is put into the buffer when the round ends: ``Receive``
   overwrites the chunk, ``Reduce`` combines with it.
3. A step whose peer is ``NONE`` does nothing, whatever its chunk and count. Every rank yields the
   same number of rounds, and the n-th round of one rank speaks to the n-th round of its peers.
4. A step moves ``count`` consecutive chunks as one message.

Programs are written in plain arithmetic with ``where`` in place of branches on the rank, so that
giving them a NumPy vector of ranks follows the whole group at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

NONE = -1
"""The peer of a step that does nothing."""

# One rank, or a NumPy vector of all of them.
Ranks = Any


def where(condition: Ranks, then: Ranks, otherwise: Ranks) -> Ranks:
    """``then`` where the condition holds, else ``otherwise``; for one rank or a vector of ranks."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, then, otherwise)
    return then if condition else otherwise


@dataclass(frozen=True, slots=True)
class Send:
    """``count`` chunks from ``chunk`` on go to the peer ``to``."""

    chunk: Ranks
    to: Ranks
    count: Ranks = 1


@dataclass(frozen=True, slots=True)
class Receive:
    """``count`` chunks from ``chunk`` on are overwritten by what the peer ``source`` sent."""

    chunk: Ranks
    source: Ranks
    count: Ranks = 1


@dataclass(frozen=True, slots=True)
class Reduce:
    """``count`` chunks from ``chunk`` on are combined with what the peer ``source`` sent."""

    chunk: Ranks
    source: Ranks
    count: Ranks = 1


Step = Send | Receive | Reduce


class Round:
    """What a rank does at once: its sends and its receives, in any order."""

    __slots__ = ("steps",)

    def __init__(self, *steps: Step) -> None:
        self.steps = steps

    def __repr__(self) -> str:
        return f"Round({', '.join(map(repr, self.steps))})"


@dataclass(frozen=True, slots=True)
class Cost:
    """The published cost of a collective on n bytes, as multiples of n.

    ``rounds`` is the longest chain of messages (the factor of alpha), ``sent`` the most bytes any
    rank sends (the factor of beta), ``reduced`` the most bytes any rank combines (of gamma).
    """

    rounds: int
    sent: Fraction
    reduced: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A program with what must be known to run and to judge it.

    ``program(rank, size, **facts)`` yields rounds; ``num_chunks(size)`` says into how many chunks
    the buffer is cut; ``cost(size)`` is the closed form that the checker holds it to.
    """

    program: Callable[..., Iterator[Round]]
    num_chunks: Callable[[int], int]
    cost: Callable[[int], Cost]


def whole(size: int) -> int:
    """The buffer is one chunk."""
    return 1


def one_per_rank(size: int) -> int:
    """The buffer is cut into as many chunks as the group has ranks."""
    return size


# --- schedules --------------------------------------------------------------------------------

FORWARD, BACKWARD = "F", "B"


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of a pipeline schedule: ``kind`` (F or B) of ``microbatch``."""

    kind: str
    microbatch: int

    def __repr__(self) -> str:
        return f"{self.kind}{self.microbatch}"


Schedule = Callable[[int, int, int], Iterator[Action]]
"""``schedule(stage, stages, microbatches)`` yields the actions of one stage in their order."""
