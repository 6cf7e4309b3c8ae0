"""Why the messages of a program do not meet: the sentence for a rank, a round and a reason.

A rank starts all messages of a round together and goes on when all of them have met their partner
(rendezvous: nothing is buffered). Between two ranks messages meet in the order they were started.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpmp.programs.steps import NONE, Reduce, Round, Send, Step

Programs = Sequence[Sequence[Round]]
"""The rounds of every rank."""


def peer_of(step: Step) -> int:
    """The other rank of a step."""
    peer: int = step.to if isinstance(step, Send) else step.source
    return peer


def live(one: Round) -> list[Step]:
    """The steps of a round that have a peer."""
    return [step for step in one.steps if peer_of(step) != NONE]


def fault(programs: Programs, num_chunks: int) -> str | None:
    """The first thing that is wrong with the messages of all ranks; None where all of them meet."""
    for rank, rounds in enumerate(programs):
        if len(rounds) != len(programs[0]):
            number = min(len(rounds), len(programs[0]))
            return (
                f"rank {rank}, round {number}: the program has {len(rounds)} rounds here "
                f"and {len(programs[0])} on rank 0; every rank must have the same number"
            )
        for number, one in enumerate(rounds):
            reason = _round_fault(one, rank, len(programs), num_chunks)
            if reason:
                return f"rank {rank}, round {number}: {reason}"
    return _Meeting(programs).fault


def _round_fault(one: Round, rank: int, size: int, num_chunks: int) -> str | None:
    """What is wrong with a round by itself, whatever the others do."""
    writers: dict[int, list[Step]] = defaultdict(list)
    for step in live(one):
        if not 0 <= peer_of(step) < size or peer_of(step) == rank:
            return f"{step} names a peer that is not another rank of the {size}"
        if step.count < 1 or step.chunk < 0 or step.chunk + step.count > num_chunks:
            return f"{step} does not lie within the {num_chunks} chunks"
        if isinstance(step, Send):
            continue
        for chunk in range(step.chunk, step.chunk + step.count):
            for writer in writers[chunk]:
                if not (isinstance(step, Reduce) and isinstance(writer, Reduce)):
                    return f"{step} and {writer} overlap in chunk {chunk}"
                if peer_of(step) == peer_of(writer):
                    return f"{step} and {writer} combine one rank's twice in chunk {chunk}"
            writers[chunk].append(step)
    return None


@dataclass(frozen=True, slots=True)
class _Post:
    """A message that was started and waits for its partner: the steps of a round with one peer."""

    rank: int
    number: int
    steps: tuple[Step, ...]

    @property
    def sends(self) -> bool:
        return isinstance(self.steps[0], Send)


class _Meeting:
    """Lets all ranks run until they end, or until one is wrong, or until nobody can go on."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.fault: str | None = None
        self.posts: dict[tuple[int, int], deque[_Post]] = defaultdict(deque)
        self.unmet = [0] * len(programs)
        self.free = deque((rank, 0) for rank in range(len(programs)))
        while self.free and not self.fault:
            rank, number = self.free.popleft()
            if number < len(programs[rank]):
                self._start(rank, number)
        stuck = [post for queue in self.posts.values() for post in queue]
        if stuck and not self.fault:
            self.fault = _deadlock(stuck)

    def _start(self, rank: int, number: int) -> None:
        messages: dict[tuple[int, int], list[Step]] = defaultdict(list)
        for step in live(self.programs[rank][number]):
            peer = peer_of(step)
            messages[(rank, peer) if isinstance(step, Send) else (peer, rank)].append(step)
        self.unmet[rank] = len(messages)
        if not messages:
            self.free.append((rank, number + 1))
        for pair, steps in messages.items():
            queue, post = self.posts[pair], _Post(rank, number, tuple(steps))
            if queue and queue[0].sends != post.sends:
                partner = queue.popleft()
                self._meet(*((post, partner) if post.sends else (partner, post)))
            else:
                queue.append(post)

    def _meet(self, send: _Post, put: _Post) -> None:
        self.fault = self.fault or _misfit(send, put)
        for post in (send, put):
            self.unmet[post.rank] -= 1
            if not self.unmet[post.rank]:
                self.free.append((post.rank, post.number + 1))


def _misfit(send: _Post, put: _Post) -> str | None:
    """What keeps two messages that met from being one."""
    where = f"rank {put.rank}, round {put.number}"
    if send.number != put.number:
        return (
            f"{where}: {put.steps[0]} meets what rank {send.rank} sends in round {send.number}; "
            "rounds of one number must speak to each other"
        )
    if len(send.steps) != len(put.steps):
        return (
            f"{where}: {put.steps[0]} is one of {len(put.steps)} steps that take a message "
            f"from rank {send.rank}, which sends it in {len(send.steps)}"
        )
    for one, other in zip(send.steps, put.steps, strict=True):
        if one.count != other.count:
            return f"{where}: {other} meets {one}, whose count is another"
    return None


def _deadlock(stuck: list[_Post]) -> str:
    """Why nobody can go on, told from the rank that is furthest behind.

    Nobody is behind it, so its peer has started that round too and has no partner for it there.
    """
    stuck.sort(key=lambda post: (post.number, post.rank))
    first = stuck[0]
    waits_for = {post.rank: peer_of(post.steps[0]) for post in reversed(stuck)}
    return (
        f"rank {first.rank}, round {first.number}: {first.steps[0]} waits for ever, because rank "
        f"{peer_of(first.steps[0])} {'receives' if first.sends else 'sends'} nothing that fits in "
        "that round" + circle(first.rank, waits_for, "ranks")
    )


def circle(start: int, waits_for: Mapping[int, int], what: str) -> str:
    """The cyclic wait that ``start`` leads to, as the end of a sentence; empty if there is none."""
    path = [start]
    while path[-1] in waits_for:
        peer = waits_for[path[-1]]
        if peer in path:
            round_trip = [*path[path.index(peer) :], peer]
            return f"; {what} {' -> '.join(map(str, round_trip))} wait for one another"
        path.append(peer)
    return ""
