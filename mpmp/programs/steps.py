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
4. A step moves ``count`` consecutive chunks. Steps of one round that go to the same peer are one
   message, their spans one after another in the order in which they are listed; so are those that
   come from the same peer. The i-th step that sends to a peer meets the i-th step of that peer that
   takes from this rank, and both have the same count.
5. Several ``Reduce`` of a round may speak of one chunk, each from another peer; nothing else may
   overlap. What a rank holds and what arrives for it are combined in the order of the ranks, its
   own at its own place: both partners of an exchange compute ``combine(lower's, higher's)``, and so
   the same bits.

Programs are written in plain arithmetic with ``where`` in place of branches on the rank, so that
giving them a NumPy vector of ranks follows the whole group at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

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
    rank sends (the factor of beta), ``reduced`` the most bytes any rank combines (of gamma) and
    ``received`` the most bytes any rank takes in, as many as are sent where it is not given.
    """

    rounds: int
    sent: Fraction
    reduced: Fraction = Fraction(0)
    received: Fraction = cast(Fraction, None)

    def __post_init__(self) -> None:
        if self.received is None:
            object.__setattr__(self, "received", self.sent)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A program with what must be known to run and to judge it.

    ``program(rank, size, **facts)`` yields rounds; ``num_chunks(size, **facts)`` says into how many
    chunks the buffer is cut; ``cost(size, **facts)`` is the closed form that the checker holds it
    to. ``facts`` names the facts that all three take, each with a default: ``root`` (a rank),
    ``hosts`` (the number of the host of each rank; empty: all on one) and ``segments`` (into how
    many pieces a pipeline cuts what it moves). ``fixed_order`` holds where a sum is combined in the
    order of the ranks, whatever the size: it has the same bits as a sum on one rank.
    """

    program: Callable[..., Iterator[Round]]
    num_chunks: Callable[..., int]
    cost: Callable[..., Cost]
    facts: tuple[str, ...] = ()
    fixed_order: bool = False

    def taken(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Of what is known of a group and a call, the facts that this program takes."""
        return {name: facts[name] for name in self.facts if name in facts}


def whole(size: int, **facts: Any) -> int:
    """The buffer is one chunk."""
    return 1


def one_per_rank(size: int, **facts: Any) -> int:
    """The buffer is cut into as many chunks as the group has ranks."""
    return size


# --- schedules --------------------------------------------------------------------------------

FORWARD, BACKWARD, WEIGHT = "F", "B", "W"


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of a pipeline schedule: ``kind`` of ``microbatch`` on this rank's ``chunk``.

    F is the forward. Where the schedule splits the backward, B is the gradient of the input and W
    that of the weights; where it does not, B is both.
    """

    kind: str
    microbatch: int
    chunk: int = 0

    def __repr__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")

    @property
    def parts(self) -> tuple[Action, ...]:
        return (self,)


@dataclass(frozen=True, slots=True)
class Fused:
    """The forward of one microbatch and the backward of another, computed as one.

    Each may cover the other's communication inside a layer. What both need must have arrived when
    it begins, and both are done when it ends.
    """

    forward: Action
    backward: Action

    def __repr__(self) -> str:
        return f"{self.forward}&{self.backward}"

    @property
    def parts(self) -> tuple[Action, ...]:
        return self.forward, self.backward


Actions = list[Action | Fused]


def anything(ranks: int, microbatches: int) -> None:
    """The demand of a schedule that works for all numbers of ranks and microbatches."""


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank of a pipeline, with what must be known to run and to judge them.

    ``program(rank, ranks, microbatches)`` yields the actions of one rank in their order. A rank
    holds ``chunks`` stages. They lie in a loop (rank 0 to p-1, then again from rank 0), or, with
    ``folded``, there and back, so that two chunks make a V. ``splits`` says that W is an action of
    its own. ``demand(ranks, microbatches)`` raises a ConfigError where there is no such schedule.

    The closed forms, where one was published: ``bubble(ranks, microbatches, forward, backward,
    weight)`` is the idle time of a rank, transfers free; ``source`` is the paper.
    """

    name: str
    program: Callable[[int, int, int], Iterable[Action | Fused]]
    source: str = ""
    chunks: int = 1
    folded: bool = False
    splits: bool = False
    demand: Callable[[int, int], None] = anything
    bubble: Callable[[int, int, float, float, float], float] | None = None

    def actions(self, rank: int, ranks: int, microbatches: int) -> Actions:
        """What one rank does, in its order."""
        self.demand(ranks, microbatches)
        return list(self.program(rank, ranks, microbatches))

    def stage_of(self, rank: int, chunk: int, ranks: int) -> int:
        """The stage that a chunk of a rank is."""
        back = self.folded and chunk % 2
        return chunk * ranks + (ranks - 1 - rank if back else rank)

    def place_of(self, stage: int, ranks: int) -> tuple[int, int]:
        """The rank and the chunk that hold a stage."""
        chunk, along = divmod(stage, ranks)
        back = self.folded and chunk % 2
        return (ranks - 1 - along if back else along), chunk
