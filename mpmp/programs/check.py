"""Check: proof that a program does what its collective promises, at its published cost.

All ranks are followed symbolically. Of every chunk on every rank we keep how often each rank's
contribution is in it, and which chunk of the input it is. A program is right when every chunk
ends in its place with the contributions its collective promises, each exactly once. No number is
ever added, so the proof holds for all data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.errors import ProgramError
from mpmp.programs.collectives import find
from mpmp.programs.follow import Message, follow_collective, follow_schedule, peak_live
from mpmp.programs.steps import Action, Algorithm, Reduce, Schedule
from mpmp.programs.tables import look_up

Counts = NDArray[np.uint8]
"""[rank, chunk, contributor]: how often a contribution is in a chunk; 2 stands for any more."""

MIXED = -1
"""The origin of a chunk in which different chunks of the input were combined."""


@dataclass(frozen=True, slots=True)
class CollectiveReport:
    """What was proved of a collective on ``size`` ranks; bytes as multiples of n."""

    size: int
    rounds: int
    messages: int
    sent: Fraction
    reduced: Fraction


@dataclass(frozen=True, slots=True)
class ScheduleReport:
    """What was proved of a schedule; ``peak_live`` counts microbatches, one number a stage."""

    stages: int
    microbatches: int
    peak_live: tuple[int, ...]


def check(collective: str, algorithm: Algorithm | str, size: int, **facts: Any) -> CollectiveReport:
    """Prove the algorithm on ``size`` ranks, or raise a ProgramError with rank, round, reason."""
    ends = look_up(ENDS, collective, "collective")
    if isinstance(algorithm, str):
        algorithm = find(collective, algorithm)
    try:
        rounds = follow_collective(algorithm, size, **facts)
        _check_contributions(rounds, algorithm.num_chunks(size), size, ends, facts)
        return _check_cost(rounds, algorithm, size)
    except ProgramError as error:
        name = getattr(algorithm.program, "__name__", collective)
        raise ProgramError(f"{name} on {size} ranks: {error}") from None


# --- what a collective promises: the counts at the end, and which chunks it speaks of -----------

Chunks = NDArray[np.bool_]
"""[rank, chunk]: whether the collective promises anything of the chunk."""

End = Callable[[Counts, dict[str, Any]], tuple[Counts, Chunks]]


def _allreduce(start: Counts, facts: dict[str, Any]) -> tuple[Counts, Chunks]:
    return np.ones_like(start), _everywhere(start)


def _reduce_scatter(start: Counts, facts: dict[str, Any]) -> tuple[Counts, Chunks]:
    return np.ones_like(start), _chunk_of_rank(start)


def _allgather(start: Counts, facts: dict[str, Any]) -> tuple[Counts, Chunks]:
    from_its_rank = _chunk_of_rank(start).astype(np.uint8)
    return np.broadcast_to(from_its_rank, start.shape), _everywhere(start)


def _broadcast(start: Counts, facts: dict[str, Any]) -> tuple[Counts, Chunks]:
    return np.broadcast_to(start[facts.get("root", 0)], start.shape), _everywhere(start)


def _everywhere(start: Counts) -> Chunks:
    return np.ones(start.shape[:2], np.bool_)


def _chunk_of_rank(start: Counts) -> Chunks:
    size, num_chunks, _ = start.shape
    if num_chunks != size:
        raise ProgramError(
            f"rank 0, round 0: the buffer is cut into {num_chunks} chunks and the collective "
            f"needs one for each of the {size} ranks"
        )
    return np.eye(size, dtype=np.bool_)


ENDS: dict[str, End] = {
    "allreduce": _allreduce,
    "reduce_scatter": _reduce_scatter,
    "allgather": _allgather,
    "broadcast": _broadcast,
}


def _check_contributions(
    rounds: list[list[Message]], num_chunks: int, size: int, ends: End, facts: dict[str, Any]
) -> None:
    """Follow the contributions through all rounds and hold their end against the promise."""
    counts = np.zeros((size, num_chunks, size), np.uint8)
    for rank in range(size):
        counts[rank, :, rank] = 1
    wanted, spoken_of = ends(counts, facts)
    # Which chunk of the input lies in a chunk, or MIXED where different ones were combined.
    origin = np.tile(np.arange(num_chunks), (size, 1))
    written = np.full((size, num_chunks), -1)
    for number, messages in enumerate(rounds):
        # All sends read the buffer as it was when the round began.
        payloads = [
            (_span(counts[m.sender], m.send).copy(), _span(origin[m.sender], m.send).copy())
            for m in messages
        ]
        for message, (count, source) in zip(messages, payloads, strict=True):
            put, receiver = message.put, message.receiver
            chunks, lies = _span(counts[receiver], put), _span(origin[receiver], put)
            if isinstance(put, Reduce):
                count = np.minimum(chunks + count, 2)
                source = np.where(lies == source, source, MIXED)
            chunks[:], lies[:] = count, source
            _span(written[receiver], put)[:] = number
    for rank, chunk, contributor in np.argwhere((counts != wanted) & spoken_of[:, :, None])[:1]:
        found = ("without", "with", "more than once with")[counts[rank, chunk, contributor]]
        often = "exactly once" if wanted[rank, chunk, contributor] else "not at all"
        raise ProgramError(
            f"{_last_write(written, rank, chunk, len(rounds))} {found} what rank {contributor} "
            f"gave, which must be in it {often}"
        )
    for rank, chunk in np.argwhere((origin != np.arange(num_chunks)) & spoken_of)[:1]:
        lies = origin[rank, chunk]
        found = "a mix of several chunks" if lies == MIXED else f"chunk {lies} of the input"
        raise ProgramError(f"{_last_write(written, rank, chunk, len(rounds))} as {found}")


def _last_write(written: NDArray[Any], rank: int, chunk: int, num_rounds: int) -> str:
    """The beginning of the sentence about a chunk that ends wrong."""
    number = written[rank, chunk]
    if number < 0:
        return (
            f"rank {rank}, round {num_rounds} (the end): chunk {chunk} was never written and ends"
        )
    return f"rank {rank}, round {number}: chunk {chunk} is written last and ends"


def _span(chunks: NDArray[Any], step: Any) -> NDArray[Any]:
    """The chunks a step speaks of, as a view."""
    return chunks[step.chunk : step.chunk + step.count]


def _check_cost(rounds: list[list[Message]], algorithm: Algorithm, size: int) -> CollectiveReport:
    """Hold rounds, and the most that any rank sends and reduces, against the closed form."""
    cost = algorithm.cost(size)
    if len(rounds) != cost.rounds:
        raise ProgramError(
            f"rank 0, round {len(rounds)}: the program ends here and its cost says "
            f"{cost.rounds} rounds"
        )
    sent, reduced = [0] * size, [0] * size
    for message in (message for messages in rounds for message in messages):
        sent[message.sender] += message.send.count
        if isinstance(message.put, Reduce):
            reduced[message.receiver] += message.put.count
    num_chunks = algorithm.num_chunks(size)
    found = {}
    for what, chunks, promised in (("sent", sent, cost.sent), ("reduced", reduced, cost.reduced)):
        found[what] = Fraction(max(chunks), num_chunks)
        if found[what] != promised:
            raise ProgramError(
                f"rank {chunks.index(max(chunks))}, round {len(rounds)} (the end): it has {what} "
                f"{found[what]} n, the most of all, and the cost says {promised} n"
            )
    num_messages = sum(map(len, rounds))
    return CollectiveReport(size, len(rounds), num_messages, found["sent"], found["reduced"])


# --- schedules ----------------------------------------------------------------------------------


def check_schedule(schedule: Schedule, stages: int, microbatches: int) -> ScheduleReport:
    """Prove that every stage does every F and B once and that no stage waits for ever."""
    actions: list[list[Action]] = [[] for _ in range(stages)]
    for stage, action in follow_schedule(schedule, stages, microbatches):
        actions[stage].append(action)
    return ScheduleReport(stages, microbatches, tuple(map(peak_live, actions)))
