"""Ranks against the clock: two ways to let them choose what they do next.

``fill`` keeps to an order of forwards and backwards and puts the weight parts where they cost
least. ``eager`` lets every rank do what has arrived, and finds an order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf

from mpmp.programs.steps import BACKWARD, FORWARD, WEIGHT, Action

EPSILON = 1e-9
"""Less than this apart two times, or two amounts of memory, are the same: sums of floats differ."""

Step = tuple[str, int]
"""Kind and chunk of a forward or a backward; the microbatch is the chunk's next."""

Orders = list[list[Step]]
"""The steps of every rank."""

Arrivals = list[dict[str, list[float]]]
"""For every stage, when what its forwards and backwards need has arrived, by microbatch."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a schedule is made for.

    Seconds of F, B and W of every stage, seconds of a transfer, the limit of every rank's memory in
    units of M_B, and the share of M_B that waits for W. Stages lie in a line, or with two chunks in
    a V.
    """

    ranks: int
    microbatches: int
    chunks: int
    seconds: tuple[tuple[float, ...], ...]
    transfer: float
    limits: tuple[float, ...]
    kept: float

    def stage(self, rank: int, chunk: int) -> int:
        return 2 * self.ranks - 1 - rank if chunk else rank

    def rank(self, stage: int) -> int:
        return min(stage, 2 * self.ranks - 1 - stage)


@dataclass(frozen=True, slots=True)
class Played:
    """The actions of every rank, and the longest span of a rank in seconds."""

    cost: float
    actions: tuple[tuple[Action, ...], ...]

    def steps(self) -> Orders:
        return [[(a.kind, a.chunk) for a in own if a.kind != WEIGHT] for own in self.actions]


class Rank:
    """One rank's clock, memory (in units of one chunk's microbatch) and actions so far."""

    def __init__(self, task: Task, number: int) -> None:
        self.task, self.number = task, number
        self.stages = [task.stage(number, chunk) for chunk in range(task.chunks)]
        self.seconds = [
            dict(zip((FORWARD, BACKWARD, WEIGHT), task.seconds[stage], strict=True))
            for stage in self.stages
        ]
        self.limit, self.memory = task.limits[number] * task.chunks + EPSILON, 0.0
        self.now, self.idle, self.began = 0.0, 0.0, inf
        self.done = {(kind, chunk): 0 for kind in "FB" for chunk in range(task.chunks)}
        self.actions: list[Action] = []
        self.waiting: deque[Action] = deque()

    @property
    def full(self) -> bool:
        """No memory for another forward."""
        return self.memory + 1 > self.limit

    def arrival(self, arrivals: Arrivals, step: Step) -> float:
        """When the next of a kind and chunk can begin, as far as it is known."""
        known = arrivals[self.stages[step[1]]][step[0]]
        return known[self.done[step]] if self.done[step] < len(known) else inf

    def do(self, step: Step, arrivals: Arrivals) -> tuple[float, int] | None:
        """A forward or a backward; when its result arrives at which rank."""
        kind, chunk = step
        arrived = self.arrival(arrivals, step)
        self.idle += max(arrived - self.now, 0.0) if self.actions else 0.0
        self.now = max(self.now, arrived)
        microbatch = self.done[step]
        self._act(Action(kind, microbatch, chunk))
        self.done[step] += 1
        self.memory += 1 if kind == FORWARD else self.task.kept - 1
        if kind == BACKWARD:
            self.waiting.append(Action(WEIGHT, microbatch, chunk))
        takes = self.stages[chunk] + (1 if kind == FORWARD else -1)
        if takes < 0:
            return None
        if takes == len(arrivals):
            takes, kind = self.stages[chunk], BACKWARD
        peer = self.task.rank(takes)
        at = self.now + (self.task.transfer if peer != self.number else 0.0)
        arrivals[takes][kind].append(at)
        return at, peer

    def weigh(self, until: float = inf) -> None:
        """The weight parts that end by then."""
        while self.waiting and self.now + self.weight_s <= until:
            self.weight()

    def weight(self) -> None:
        """The weight part that has waited longest."""
        self._act(self.waiting.popleft())
        self.memory -= self.task.kept

    @property
    def weight_s(self) -> float:
        """Seconds of the weight part that has waited longest."""
        return self.seconds[self.waiting[0].chunk][WEIGHT]

    def _act(self, action: Action) -> None:
        self.began = min(self.began, self.now)
        self.now += self.seconds[action.chunk][action.kind]
        self.actions.append(action)


def _begin(task: Task) -> tuple[list[Rank], Arrivals]:
    ranks = [Rank(task, number) for number in range(task.ranks)]
    arrivals: Arrivals = [{FORWARD: [], BACKWARD: []} for _ in range(task.ranks * task.chunks)]
    arrivals[0][FORWARD] = [0.0] * task.microbatches
    return ranks, arrivals


def _end(task: Task, ranks: list[Rank]) -> Played | None:
    """What was played, if that is everything; the weight parts that are left come last."""
    steps = 2 * task.chunks * task.microbatches
    if any(sum(rank.done.values()) < steps for rank in ranks):
        return None
    for rank in ranks:
        rank.weigh()
    cost = max(rank.now - rank.began for rank in ranks)
    return Played(cost, tuple(tuple(rank.actions) for rank in ranks))


def fill(task: Task, order: Iterable[Iterable[Step]], budget: float) -> Played | None:
    """Every rank's forwards and backwards in their order, with the weight parts between them.

    Where what is next has not arrived, a rank does the weight parts that fit, and one that does not
    if else it would have idled more than ``budget`` seconds in all. Where memory is short it does
    weight parts, then backwards, before a forward. None where that is of no help.
    """
    ranks, arrivals = _begin(task)
    todo = [list(reversed(list(steps))) for steps in order]
    moved = True
    while moved:
        moved = False
        for rank, steps in zip(ranks, todo, strict=True):
            while steps and _room(rank, steps):
                arrived = rank.arrival(arrivals, steps[-1])
                if arrived == inf:
                    break
                rank.weigh(until=arrived + EPSILON)
                early = arrived > rank.now + EPSILON
                if early and rank.waiting and rank.idle + arrived - rank.now > budget + EPSILON:
                    rank.weight()
                rank.do(steps.pop(), arrivals)
                moved = True
    return _end(task, ranks)


def _room(rank: Rank, steps: list[Step]) -> bool:
    """Make room for a forward that is next: by weight parts, else by the next backward instead."""
    if steps[-1][0] == BACKWARD:
        return True
    while rank.full and rank.waiting:
        rank.weight()
    if rank.full:
        backwards = (place for place in reversed(range(len(steps))) if steps[place][0] == BACKWARD)
        steps.append(steps.pop(next(backwards)))
    return True


def eager(task: Task, cap: int, first: str, patience: float) -> Played | None:
    """Every rank does what has arrived, kind ``first`` before the other and later chunks first.

    Rank 0 lets at most ``cap`` microbatches in. If nothing is there, it does a weight part, unless
    something is known to arrive within the share ``patience`` of it. None where all ranks come to
    wait for memory.
    """
    ranks, arrivals = _begin(task)
    events = [(0.0, number) for number in range(task.ranks)]
    heapify(events)
    while events:
        now, number = heappop(events)
        rank = ranks[number]
        if now < rank.now - EPSILON:
            continue
        steps = list(_open(rank, cap))
        there = [step for step in steps if rank.arrival(arrivals, step) <= now + EPSILON]
        rank.now = max(rank.now, now) if rank.actions else now
        if there:
            reaches = rank.do(min(there, key=lambda s: (s[0] != first, -s[1])), arrivals)
            if reaches:
                heappush(events, reaches)
        elif rank.waiting:
            soon = min((rank.arrival(arrivals, step) for step in steps), default=inf)
            if soon - now < patience * rank.weight_s - EPSILON:
                continue
            rank.weight()
        else:
            continue
        heappush(events, (rank.now, number))
    return _end(task, ranks)


def _open(rank: Rank, cap: int) -> Iterator[Step]:
    """The steps that memory allows."""
    inside = rank.done[FORWARD, 0] - rank.done[BACKWARD, 0]
    for step in rank.done:
        if step[0] == BACKWARD or not (rank.full or (step[1] == 0 and inside >= cap)):
            yield step
