"""Simulate: the time a program takes on a described link, or a schedule on described stages.

Collectives, the alpha-beta-gamma model: every rank has one port out and one port in, which work at
the same time. A message of n bytes takes ``alpha + n beta`` from the moment both ports are free;
the messages of a round use a port one after another, in the order in which the receiver lists
them. What arrived is combined at ``gamma`` a byte once all messages of the rank's round are
through; then the rank's next round begins. No links are shared and no rank waits for another but
by messages.

Schedules: a stage does its actions in their order, each as soon as what it needs has arrived.
Transfers take ``transfer`` seconds from the end of an action and keep nobody busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.errors import ProgramError
from mpmp.programs.follow import follow_schedule, need, peak_live
from mpmp.programs.partition import partition
from mpmp.programs.steps import (
    FORWARD,
    NONE,
    Action,
    Algorithm,
    Reduce,
    Round,
    Schedule,
    Send,
    Step,
)

Vector = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Link:
    """Seconds per message, per byte sent and per byte combined."""

    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float = 0.0


def simulate_collective(
    algorithm: Algorithm, size: int, nbytes: int, link: Link, **facts: Any
) -> float:
    """Seconds until the last of ``size`` ranks has ended, for a buffer of ``nbytes``."""
    pieces = partition(nbytes, algorithm.num_chunks(size))
    bounds = np.array([0, *(stop for _, stop in pieces)])
    now = np.zeros(size)
    for number, one in enumerate(algorithm.program(np.arange(size), size, **facts)):
        now = _end_of_round(number, one, now, bounds, link)
    return float(now.max())


def _end_of_round(number: int, one: Round, now: Vector, bounds: Vector, link: Link) -> Vector:
    """When each rank ends the round that it began at ``now``."""
    ranks = np.arange(len(now))
    out_free, in_free, combining = now.copy(), now.copy(), np.zeros(len(now))
    sends = [step for step in one.steps if isinstance(step, Send)]
    # Peers of the sends and receives that have not met yet; a met one becomes NONE.
    to = [_peers(step.to, ranks) for step in sends]
    for put in one.steps:
        if isinstance(put, Send):
            continue
        source = _peers(put.source, ranks)
        for peers, send in zip(to, sends, strict=True):
            receiver = np.flatnonzero((source != NONE) & (peers[source] == ranks))
            sender = source[receiver]
            nbytes = _span_bytes(send, sender, bounds)
            arrival = np.maximum(out_free[sender], in_free[receiver])
            arrival += link.alpha_s + nbytes * link.beta_s_per_byte
            out_free[sender] = in_free[receiver] = arrival
            if isinstance(put, Reduce):
                combining[receiver] += nbytes * link.gamma_s_per_byte
            peers[sender] = source[receiver] = NONE
        _all_met(number, source, "receives from")
    for peers in to:
        _all_met(number, peers, "sends to")
    ended: Vector = np.maximum(out_free, in_free) + combining
    return ended


def _peers(peers: Any, ranks: Vector) -> Vector:
    return np.broadcast_to(peers, ranks.shape).copy()


def _span_bytes(step: Step, ranks: Vector, bounds: Vector) -> Vector:
    """The bytes of the chunks a step speaks of on the given ranks."""
    chunk, count = (
        part if np.ndim(part) == 0 else part[ranks] for part in (step.chunk, step.count)
    )
    span: Vector = np.broadcast_to(bounds[chunk + count] - bounds[chunk], ranks.shape)
    return span


def _all_met(number: int, peers: Vector, does: str) -> None:
    if (peers != NONE).any():
        rank = int(np.flatnonzero(peers != NONE)[0])
        raise ProgramError(
            f"rank {rank}, round {number}: {does} rank {peers[rank]}, which has no partner for it; "
            "check the program before it is simulated"
        )


# --- schedules ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one microbatch on a stage, one number or one a stage; ``transfer`` between stages.

    ``backward`` is the gradient of the input and ``weight`` that of the weights: a schedule that
    does not split them takes their sum for a B.
    """

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 1.0
    weight: float | Sequence[float] = 0.0
    transfer: float = 0.0

    def of(self, stage: int, action: Action) -> float:
        """Seconds that ``action`` takes on ``stage``."""
        if action.kind == FORWARD:
            return _one(self.forward, stage)
        return _one(self.backward, stage) + _one(self.weight, stage)


def _one(times: float | Sequence[float], stage: int) -> float:
    return times[stage] if isinstance(times, Sequence) else times


@dataclass(frozen=True, slots=True)
class Span:
    """One action of one stage, from start to end in seconds."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """When every stage of the schedule ``name`` does what."""

    name: str
    stages: int
    microbatches: int
    spans: tuple[Span, ...]

    def of(self, stage: int) -> list[Span]:
        """The spans of one stage in their order."""
        return [span for span in self.spans if span.stage == stage]

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def busy(self) -> float:
        """Seconds that the stages work, all added."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def bubble(self) -> float:
        """Idle share of the time of all stages: (p-1)/(m+p-1) in Huang et al. 2019."""
        total = self.stages * self.makespan
        return (total - self.busy) / total if total else 0.0

    @property
    def bubble_over_ideal(self) -> float:
        """Idle over busy time of all stages: (p-1)/m in Narayanan et al. 2021."""
        return (self.stages * self.makespan - self.busy) / self.busy if self.busy else 0.0

    @property
    def peak_live(self) -> tuple[int, ...]:
        """The most microbatches each stage keeps activations of."""
        return tuple(
            peak_live(span.action for span in self.of(stage)) for stage in range(self.stages)
        )


def simulate_schedule(
    schedule: Schedule, stages: int, microbatches: int, times: Times | None = None
) -> Timeline:
    """The timeline of all stages; without ``times`` every action takes one unit."""
    times = times or Times()
    end: dict[tuple[int, Action], float] = {}
    free = [0.0] * stages
    spans = []
    for stage, action in follow_schedule(schedule, stages, microbatches):
        needed = need(stage, stages, action)
        arrived = end[needed] + times.transfer if needed else 0.0
        start = max(free[stage], arrived)
        free[stage] = end[stage, action] = start + times.of(stage, action)
        spans.append(Span(stage, action, start, free[stage]))
    name = getattr(schedule, "__name__", "schedule")
    return Timeline(name, stages, microbatches, tuple(spans))
