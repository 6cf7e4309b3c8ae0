"""Check of window programs: nobody reads too early, nobody overwrites what is still read.

Nothing is matched here, for nothing is sent. What is proved is *happens-before* (Lamport 1978):
each rank carries a vector clock, publishing shows it, awaiting takes it over. Two accesses to one
chunk of one window, of which one writes, must be ordered, whatever the speed of the ranks. The
program is followed three times in a row, as it is replayed: the owner writes a new input before
and reads the result after each time, so a program that ends too early is caught by its next turn.
A slot is one place, whichever chunk passes through it, and a private result is its input's place.
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
    Await,
    Combine,
    Load,
    Publish,
    WindowAlgorithm,
    WindowCost,
    WindowStep,
    members,
)

TURNS = 3
"""Replays that are followed: with two slots the third meets the memory of the first."""

Clock = NDArray[np.int64]
Place = tuple[int, int, int]
"""Rank whose memory it is, slot (RESULT for its private result), chunk (0 in a slot)."""


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
        _check_form(rank, one, steps[0], size, num_chunks, algorithm.slots)
    _Run(collective, algorithm, steps, size, num_chunks, facts).follow()
    return _check_cost(algorithm.cost(size, **facts), steps, size, num_chunks)


def _check_form(
    rank: int,
    steps: list[WindowStep],
    first: list[WindowStep],
    size: int,
    num_chunks: int,
    slots: int,
) -> None:
    """What is wrong with one rank's program by itself."""
    published = sum(isinstance(step, Publish) for step in steps)
    wanted = sum(isinstance(step, Publish) for step in first)
    if published != wanted:
        raise ProgramError(
            f"rank {rank}, step {len(steps)} (the end): it has published {published} times and "
            f"rank 0 {wanted} times; every rank must publish equally often"
        )
    loads = isinstance(steps[0], Load)
    if slots > 1 and not loads:
        raise ProgramError(f"rank {rank}, step 0: a program with slots begins with Load")
    for number, begins in enumerate((Publish(), Await(ALL)), start=int(loads)):
        if steps[number : number + 1] != [begins]:
            raise ProgramError(
                f"rank {rank}, step {number}: every program begins with Publish and Await of ALL, "
                "for there the ranks compare what they are about to do and where their windows are"
            )
    for number, step in enumerate(steps):
        if isinstance(step, Await):
            known = step.source == ALL or 0 <= step.source < size
        elif isinstance(step, Combine):
            known = (step.sum_from == ALL or 0 <= step.sum_from < size) and (
                step.store_to in (ALL, RESULT, NONE) or 0 <= step.store_to < size
            )
            known &= step.count >= 1 and 0 <= step.chunk <= num_chunks - step.count
            known &= (
                not loads or step.store_to == NONE or (step.count, step.store_to) == (1, RESULT)
            )
        elif isinstance(step, Load):
            known = loads and 0 <= step.chunk < num_chunks
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
        self.slots, self.steps = algorithm.slots, steps
        self.size, self.num_chunks = size, num_chunks
        self.num_done = 0
        self.clocks = np.zeros((size, size), np.int64)
        self.published: list[list[Clock]] = [[] for _ in range(size)]
        self.last_write: dict[Place, _Access] = {}
        self.reads: dict[Place, list[_Access]] = {}
        # How often each rank's contribution to which chunk lies in a place: {(rank, chunk): times}
        self.content: dict[Place, dict[tuple[int, int], int]] = {}
        self.loads = isinstance(steps[0][0], Load)
        self.private = any(
            isinstance(step, Combine) and step.store_to == RESULT for one in steps for step in one
        )

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
                    self._combine(rank, (total - 1) % self.slots, step, f"rank {rank}, {said}")
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
            place = (rank, RESULT if self.loads else 0, chunk)
            self._write(rank, place, f"rank {rank}, the input of turn {turn}")
            self.content[place] = {(rank, chunk): 1}

    def _load(self, rank: int, slot: int, step: Load, said: str) -> None:
        self._write(rank, (rank, slot, 0), said)
        self.content[rank, slot, 0] = self.content[rank, RESULT, step.chunk]

    def _combine(self, rank: int, slot: int, step: Combine, said: str) -> None:
        for chunk in range(step.chunk, step.chunk + step.count):
            total: dict[tuple[int, int], int] = {}
            for source in members(step.sum_from, self.size):
                place = (source, slot, chunk)
                if self.loads:  # what it has loaded a rank reads where it was
                    place = (rank, RESULT, chunk) if source == rank else (source, slot, 0)
                self._read(rank, place, said)
                for key, times in self.content.get(place, {}).items():
                    total[key] = total.get(key, 0) + times
            if step.store_to == RESULT:
                self.content[rank, RESULT, chunk] = total
                continue
            for target in members(step.store_to, self.size):
                self._write(rank, (target, slot, chunk), said)
                self.content[target, slot, chunk] = dict(total)

    def _take(self, rank: int, turn: int) -> None:
        """The owner reads its result, which must be what the collective promises."""
        if self.collective == "barrier":
            self._heard_of_all(rank, turn)
            return
        where = RESULT if self.private else 0
        for chunk in range(self.num_chunks):
            wanted = self._promise(rank, chunk)
            if wanted is None:
                continue
            place, said = (rank, where, chunk), f"rank {rank}, the result of turn {turn}"
            if not self.private:
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
        combines = [step for step in one if isinstance(step, Combine) and step.store_to != NONE]
        read.append(sum(len(members(s.sum_from, size)) * s.count for s in combines))
        written.append(sum(_num_targets(s.store_to, size) * s.count for s in combines))
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


def _num_targets(store_to: int, size: int) -> int:
    return size if store_to == ALL else 1
