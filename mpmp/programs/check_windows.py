"""Check of window programs: nobody reads too early, nobody overwrites what is still read.

Nothing is matched here, for nothing is sent. What is proved is *happens-before* (Lamport 1978):
each rank carries a vector clock, publishing shows it, awaiting takes it over. Two accesses to one
chunk of one window, of which one writes, must be ordered, whatever the speed of the ranks. The
program is followed three times in a row, as it is replayed: the owner writes a new input before
and reads the result after each time, so a program that ends too early is caught by its next turn.
A slot has the places of one piece, whichever passes through it, and a private result is its input's
place.
Contributions are counted as for message programs: what each chunk holds, each exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.errors import ProgramError
from mpmp.programs.steps import NONE
from mpmp.programs.windows import (
    ALL,
    RESULT,
    RESULT_AND_SLOT,
    Await,
    Combine,
    Load,
    Publish,
    WindowAlgorithm,
    WindowCost,
    WindowStep,
    members,
    touched,
)

TURNS = 3
"""Replays that are followed: with two slots the third meets the memory of the first."""

Clock = NDArray[np.int64]
Place = tuple[int, int, int]
"""Rank whose memory it is, slot (RESULT for its private result), chunk (its place in a slot)."""


@dataclass(frozen=True, slots=True)
class WindowReport:
    """What was proved of a window program on ``size`` ranks; bytes as multiples of n."""

    size: int
    syncs: int
    read: Fraction
    written: Fraction


@dataclass(slots=True)
class _Access:
    rank: int
    time: int
    said: str


def check_window(
    collective: str, algorithm: WindowAlgorithm, size: int, **facts: Any
) -> WindowReport:
    """Prove the program on ``size`` ranks, or raise a ProgramError with rank, step and reason."""
    steps = [list(algorithm.program(rank, size, **facts)) for rank in range(size)]
    num_chunks = algorithm.num_chunks(size, **facts)
    for rank, one in enumerate(steps):
        _check_form(rank, one, steps[0], size, num_chunks, algorithm)
    _Run(collective, algorithm, steps, size, num_chunks, facts).follow()
    return _check_cost(algorithm.cost(size, **facts), steps, size, num_chunks)


def _check_form(
    rank: int,
    steps: list[WindowStep],
    first: list[WindowStep],
    size: int,
    num_chunks: int,
    algorithm: WindowAlgorithm,
) -> None:
    """What is wrong with one rank's program by itself."""
    published = sum(isinstance(step, Publish) for step in steps)
    wanted = sum(isinstance(step, Publish) for step in first)
    if published != wanted:
        raise ProgramError(
            f"rank {rank}, step {len(steps)} (the end): it has published {published} times and "
            f"rank 0 {wanted} times; every rank must publish equally often"
        )
    begins = next((at for at, step in enumerate(steps) if not isinstance(step, Load)), len(steps))
    for number, begin in enumerate((Publish(), Await(ALL)), start=begins):
        if steps[number : number + 1] != [begin]:
            raise ProgramError(
                f"rank {rank}, step {number}: every program begins with Publish and Await of ALL, "
                "for there the ranks compare what they are about to do and where their windows are"
            )
    in_slots = algorithm.slots > 0
    for number, step in enumerate(steps):
        if isinstance(step, Await):
            known = step.source == ALL or 0 <= step.source < size
        elif isinstance(step, Combine):
            private = RESULT, RESULT_AND_SLOT, NONE
            to_windows = step.store_to == ALL or 0 <= step.store_to < size
            known = step.sum_from == ALL or 0 <= step.sum_from < size
            known &= step.store_to in private if in_slots else to_windows or step.store_to == NONE
            known &= step.count == 1 if in_slots else step.count >= 1
            known &= 0 <= step.chunk <= num_chunks - step.count
        elif isinstance(step, Load):
            known = in_slots and 0 <= step.chunk < num_chunks
        else:
            known = True
        if not known:
            raise ProgramError(
                f"rank {rank}, step {number}: {step} speaks of ranks or chunks that are not among "
                f"the {size} ranks and {num_chunks} chunks, or of slots where there are none"
            )


class _Run:
    """All ranks of a program over ``TURNS`` replays, as far as they can go."""

    def __init__(
        self,
        collective: str,
        algorithm: WindowAlgorithm,
        steps: list[list[WindowStep]],
        size: int,
        num_chunks: int,
        facts: dict[str, Any],
    ) -> None:
        self.collective, self.facts = collective, facts
        self.slots, self.steps = max(algorithm.slots, 1), steps
        self.size, self.num_chunks = size, num_chunks
        self.num_done = 0
        self.clocks = np.zeros((size, size), np.int64)
        self.published: list[list[Clock]] = [[] for _ in range(size)]
        self.last_write: dict[Place, _Access] = {}
        self.reads: dict[Place, list[_Access]] = {}
        # How often each rank's contribution to which chunk lies in a place: {(rank, chunk): times}
        self.content: dict[Place, dict[tuple[int, int], int]] = {}
        self.in_slots = algorithm.slots > 0
        self.piece = algorithm.chunks_of_piece(size) if self.in_slots else num_chunks

    def follow(self) -> None:
        """Let every rank go on in turn until all have ended, or none can."""
        ranks = {rank: self._one(rank) for rank in range(self.size)}
        waits: dict[int, str] = {}
        while ranks:
            before = self.num_done
            for rank, one in list(ranks.items()):
                waits[rank] = next(one, "")
                if not waits[rank]:
                    del ranks[rank]
                    self.num_done += 1
            if self.num_done == before:
                rank = min(ranks)
                raise ProgramError(f"rank {rank}, {waits[rank]} waits for ever")

    def _one(self, rank: int) -> Iterator[str]:
        """One rank; yields where it cannot go on, with the words for it."""
        total = 0
        for turn in range(TURNS):
            self._fill(rank, turn)
            for number, step in enumerate(self.steps[rank]):
                said = f"step {number}: {step}"
                if isinstance(step, Publish):
                    total += 1
                    self._tick(rank)
                    self.published[rank].append(self.clocks[rank].copy())
                elif isinstance(step, Await):
                    for source in members(step.source, self.size):
                        while len(self.published[source]) < total:
                            yield said
                        seen = self.published[source][total - 1]
                        np.maximum(self.clocks[rank], seen, out=self.clocks[rank])
                elif isinstance(step, Load):
                    self._load(rank, total % self.slots, step, f"rank {rank}, {said}")
                elif step.store_to != NONE:
                    self._combine(rank, total, step, f"rank {rank}, {said}")
                self.num_done += 1
            self._take(rank, turn)

    def _tick(self, rank: int) -> None:
        self.clocks[rank, rank] += 1

    # --- accesses ---------------------------------------------------------------------------------

    def _read(self, rank: int, place: Place, said: str) -> None:
        self._ordered(rank, self.last_write.get(place), place, said)
        self._tick(rank)
        access = _Access(rank, int(self.clocks[rank, rank]), said)
        self.reads.setdefault(place, []).append(access)

    def _write(self, rank: int, place: Place, said: str) -> None:
        self._ordered(rank, self.last_write.get(place), place, said)
        for other in self.reads.pop(place, []):
            self._ordered(rank, other, place, said)
        self._tick(rank)
        self.last_write[place] = _Access(rank, int(self.clocks[rank, rank]), said)

    def _ordered(self, rank: int, before: _Access | None, place: Place, said: str) -> None:
        """The earlier access must have been published to this rank, or be its own."""
        if before is None or before.rank == rank:
            return
        if self.clocks[rank, before.rank] <= before.time:
            owner, _, chunk = place
            raise ProgramError(
                f"{said}: chunk {chunk} of the window of rank {owner} is not ordered with "
                f"{before.said}; nothing makes one happen before the other"
            )

    # --- what the words do ------------------------------------------------------------------------

    def _fill(self, rank: int, turn: int) -> None:
        for chunk in range(self.num_chunks):
            place = (rank, RESULT if self.in_slots else 0, chunk)
            self._write(rank, place, f"rank {rank}, the input of turn {turn}")
            self.content[place] = {(rank, chunk): 1}

    def _load(self, rank: int, slot: int, step: Load, said: str) -> None:
        place = (rank, slot, step.chunk % self.piece)
        self._write(rank, place, said)
        self.content[place] = self.content[rank, RESULT, step.chunk]

    def _combine(self, rank: int, total: int, step: Combine, said: str) -> None:
        """After ``total`` publications: what was published last is read."""
        slot, turn = (total - 1) % self.slots, total % self.slots
        for chunk in range(step.chunk, step.chunk + step.count):
            held: dict[tuple[int, int], int] = {}
            at = chunk % self.piece
            for source in members(step.sum_from, self.size):
                own = self.in_slots and source == rank  # read where it was loaded from
                place = (rank, RESULT, chunk) if own else (source, slot, at)
                self._read(rank, place, said)
                for key, times in self.content.get(place, {}).items():
                    held[key] = held.get(key, 0) + times
            targets = [(target, slot, at) for target in members(step.store_to, self.size)]
            if self.in_slots:
                targets = [(rank, RESULT, chunk)]
            if step.store_to == RESULT_AND_SLOT:
                targets.append((rank, turn, at))
            for place in targets:
                self._write(rank, place, said)
                self.content[place] = dict(held)

    def _take(self, rank: int, turn: int) -> None:
        """The owner reads its result, which must be what the collective promises."""
        if self.collective == "barrier":
            self._heard_of_all(rank, turn)
            return
        where = RESULT if self.in_slots else 0
        for chunk in range(self.num_chunks):
            wanted = self._promise(rank, chunk)
            if wanted is None:
                continue
            place, said = (rank, where, chunk), f"rank {rank}, the result of turn {turn}"
            self._read(rank, place, said)
            found = self.content.get(place, {})
            if found != wanted:
                raise ProgramError(
                    f"{said}: chunk {chunk} holds {_words(found)} and must hold {_words(wanted)}"
                )

    def _heard_of_all(self, rank: int, turn: int) -> None:
        each_turn = sum(isinstance(step, Publish) for step in self.steps[rank])
        for other in range(self.size):
            first = turn * each_turn
            heard = len(self.published[other]) > first and (
                self.clocks[rank, other] >= self.published[other][first][other]
            )
            if not heard:
                raise ProgramError(
                    f"rank {rank}, the end of turn {turn}: it has not heard of rank {other}"
                )

    def _promise(self, rank: int, chunk: int) -> dict[tuple[int, int], int] | None:
        """What a chunk must hold at the end; None where nothing is promised."""
        everyone = {(other, chunk): 1 for other in range(self.size)}
        if self.collective == "allreduce":
            return everyone
        if self.collective == "reduce_scatter":
            return everyone if chunk == rank else None
        if self.collective == "allgather":
            return {(chunk, chunk): 1}
        if self.collective == "broadcast":
            return {(self.facts.get("root", 0), chunk): 1}
        raise ProgramError(f"no promise is written down for {self.collective} in windows")


def _words(content: dict[tuple[int, int], int]) -> str:
    parts = [
        f"{'' if times == 1 else f'{times} times '}chunk {chunk} of rank {rank}"
        for (rank, chunk), times in sorted(content.items())
    ]
    return " + ".join(parts) or "nothing"


def _check_cost(
    cost: WindowCost, steps: list[list[WindowStep]], size: int, num_chunks: int
) -> WindowReport:
    """Hold waits and the most bytes any rank touches against the closed form."""
    syncs = max(sum(isinstance(step, Await) for step in one) for one in steps)
    read, written = [], []
    for one in steps:
        moves = [
            (step.count, *touched(step, size)) for step in one if isinstance(step, Combine | Load)
        ]
        read.append(sum(int(count * reads) for count, reads, _ in moves))
        written.append(sum(int(count * writes) for count, _, writes in moves))
    found = WindowReport(
        size, syncs, Fraction(max(read), num_chunks), Fraction(max(written), num_chunks)
    )
    for what in ("syncs", "read", "written"):
        if getattr(found, what) != getattr(cost, what):
            raise ProgramError(
                f"rank 0, the end: {what} is {getattr(found, what)} and the cost says "
                f"{getattr(cost, what)}"
            )
    return found
