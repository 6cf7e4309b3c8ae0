"""All ranks of a program at once: which send meets which receive, which action waits for which.

A rank starts all steps of a round together and goes on when all of them have met their partner
(rendezvous: nothing is buffered). Between two ranks messages meet in the order they were started.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpmp.errors import ProgramError
from mpmp.programs.steps import (
    BACKWARD,
    FORWARD,
    NONE,
    Action,
    Algorithm,
    Receive,
    Reduce,
    Round,
    Schedule,
    Send,
    Step,
)


@dataclass(frozen=True, slots=True)
class Message:
    """A send of ``sender`` that meets a receive or a reduction of ``receiver``."""

    sender: int
    receiver: int
    send: Send
    put: Receive | Reduce


def follow_collective(algorithm: Algorithm, size: int, **facts: Any) -> list[list[Message]]:
    """The messages of every round; a ProgramError names the rank, the round and what is wrong."""
    programs = [list(algorithm.program(rank, size, **facts)) for rank in range(size)]
    num_chunks = algorithm.num_chunks(size)
    for rank, rounds in enumerate(programs):
        if len(rounds) != len(programs[0]):
            number = min(len(rounds), len(programs[0]))
            raise ProgramError(
                f"rank {rank}, round {number}: the program has {len(rounds)} rounds here "
                f"and {len(programs[0])} on rank 0; every rank must have the same number"
            )
        for number, one in enumerate(rounds):
            fault = _fault(one, rank, size, num_chunks)
            if fault:
                raise ProgramError(f"rank {rank}, round {number}: {fault}")
    return _Meeting(programs).messages


def peer_of(step: Step) -> int:
    """The other rank of a step."""
    peer: int = step.to if isinstance(step, Send) else step.source
    return peer


def live(one: Round) -> list[Step]:
    """The steps of a round that have a peer."""
    return [step for step in one.steps if peer_of(step) != NONE]


def _fault(one: Round, rank: int, size: int, num_chunks: int) -> str | None:
    """What is wrong with a round by itself, whatever the others do."""
    writers: dict[int, Step] = {}
    for step in live(one):
        if not 0 <= peer_of(step) < size or peer_of(step) == rank:
            return f"{step} names a peer that is not another rank of the {size}"
        if step.count < 1 or step.chunk < 0 or step.chunk + step.count > num_chunks:
            return f"{step} does not lie within the {num_chunks} chunks"
        if isinstance(step, Send):
            continue
        for chunk in range(step.chunk, step.chunk + step.count):
            if chunk in writers:
                return f"{step} and {writers[chunk]} overlap in chunk {chunk}"
            writers[chunk] = step
    return None


@dataclass(frozen=True, slots=True)
class _Post:
    """A step that was started and waits for its partner."""

    rank: int
    number: int
    step: Step


class _Meeting:
    """Lets all ranks run until they end, or until nobody can go on."""

    def __init__(self, programs: list[list[Round]]) -> None:
        self.programs = programs
        self.messages: list[list[Message]] = [[] for _ in programs[0]]
        self.posts: dict[tuple[int, int], deque[_Post]] = defaultdict(deque)
        self.unmet = [0] * len(programs)
        self.free = deque((rank, 0) for rank in range(len(programs)))
        while self.free:
            rank, number = self.free.popleft()
            if number < len(self.messages):
                self._start(rank, number)
        stuck = [post for queue in self.posts.values() for post in queue]
        if stuck:
            raise ProgramError(_deadlock(stuck))

    def _start(self, rank: int, number: int) -> None:
        steps = live(self.programs[rank][number])
        self.unmet[rank] = len(steps)
        if not steps:
            self.free.append((rank, number + 1))
        for step in steps:
            sends = isinstance(step, Send)
            pair = (rank, peer_of(step)) if sends else (peer_of(step), rank)
            queue, post = self.posts[pair], _Post(rank, number, step)
            if queue and isinstance(queue[0].step, Send) != sends:
                partner = queue.popleft()
                self._meet(*((post, partner) if sends else (partner, post)))
            else:
                queue.append(post)

    def _meet(self, send: _Post, put: _Post) -> None:
        assert isinstance(send.step, Send) and not isinstance(put.step, Send)
        where = f"rank {put.rank}, round {put.number}"
        if send.number != put.number:
            raise ProgramError(
                f"{where}: {put.step} meets what rank {send.rank} sends in round {send.number}; "
                "rounds of one number must speak to each other"
            )
        if send.step.count != put.step.count:
            raise ProgramError(f"{where}: {put.step} meets {send.step}, whose count is another")
        self.messages[put.number].append(Message(send.rank, put.rank, send.step, put.step))
        for post in (send, put):
            self.unmet[post.rank] -= 1
            if not self.unmet[post.rank]:
                self.free.append((post.rank, post.number + 1))


def _deadlock(stuck: list[_Post]) -> str:
    """Why nobody can go on, told from the rank that is furthest behind.

    Nobody is behind it, so its peer has started that round too and has no partner for it there.
    """
    stuck.sort(key=lambda post: (post.number, post.rank))
    first = stuck[0]
    waits_for = {post.rank: peer_of(post.step) for post in reversed(stuck)}
    missing = "receives" if isinstance(first.step, Send) else "sends"
    return (
        f"rank {first.rank}, round {first.number}: {first.step} waits for ever, because rank "
        f"{peer_of(first.step)} {missing} nothing that fits in that round"
        + _circle(first.rank, waits_for, "ranks")
    )


def _circle(start: int, waits_for: Mapping[int, int], what: str) -> str:
    """The cyclic wait that ``start`` leads to, as the end of a sentence; empty if there is none."""
    path = [start]
    while path[-1] in waits_for:
        peer = waits_for[path[-1]]
        if peer in path:
            circle = [*path[path.index(peer) :], peer]
            return f"; {what} {' -> '.join(map(str, circle))} wait for one another"
        path.append(peer)
    return ""


def need(stage: int, stages: int, action: Action) -> tuple[int, Action] | None:
    """The stage and action that must be done before ``action``, if it is on another stage."""
    before = stage - 1 if action.kind == FORWARD else stage + 1
    return (before, action) if 0 <= before < stages else None


def follow_schedule(
    schedule: Schedule, stages: int, microbatches: int
) -> Iterator[tuple[int, Action]]:
    """(stage, action) of all stages, each after what it needs; a ProgramError where none can."""
    todo = [list(schedule(stage, stages, microbatches)) for stage in range(stages)]
    for stage, actions in enumerate(todo):
        _complete(stage, actions, microbatches)
    done: set[tuple[int, Action]] = set()
    position = [0] * stages
    while True:
        waits_for: dict[int, int] = {}
        before = len(done)
        for stage, actions in enumerate(todo):
            for action in actions[position[stage] :]:
                needed = need(stage, stages, action)
                if needed is not None and needed not in done:
                    waits_for[stage] = needed[0]
                    break
                done.add((stage, action))
                position[stage] += 1
                yield stage, action
        if not waits_for:
            return
        if len(done) == before:
            stage = min(waits_for)
            raise ProgramError(
                f"stage {stage}, action {position[stage]}: {todo[stage][position[stage]]} waits "
                f"for ever for stage {waits_for[stage]}" + _circle(stage, waits_for, "stages")
            )


def _complete(stage: int, actions: Iterable[Action], microbatches: int) -> None:
    """Refuse actions that are not F and B of every microbatch once, B after its F."""
    seen: set[Action] = set()
    expected = {
        Action(kind, microbatch)
        for kind in (FORWARD, BACKWARD)
        for microbatch in range(microbatches)
    }
    for position, action in enumerate(actions):
        where = f"stage {stage}, action {position}: {action}"
        if action not in expected:
            raise ProgramError(f"{where} is no F or B of the {microbatches} microbatches")
        if action in seen:
            raise ProgramError(f"{where} is done a second time")
        if action.kind == BACKWARD and Action(FORWARD, action.microbatch) not in seen:
            raise ProgramError(f"{where} comes before its forward")
        seen.add(action)
    if expected - seen:
        missing = ", ".join(sorted(map(repr, expected - seen)))
        raise ProgramError(
            f"stage {stage}, action {len(seen)}: the schedule ends without {missing}"
        )


def peak_live(actions: Iterable[Action]) -> int:
    """The most microbatches whose forward is done and whose backward is not, on one stage."""
    peak = alive = 0
    for action in actions:
        alive += 1 if action.kind == FORWARD else -1
        peak = max(peak, alive)
    return peak
