"""Simulate: the time a program takes on a described cluster, or a schedule on described stages.

Collectives, the alpha-beta-gamma model: every rank has one port out and one port in, which work at
the same time. A message of n bytes takes ``alpha + n beta`` from the moment both ports are free;
all steps of a round between two ranks are one message. The messages of a round use a port one after
another, in the order in which the receiver lists them. What arrived is combined at ``gamma`` a byte
once all messages of the rank's round are through; then the rank's next round begins. No rank waits
for another but by messages.

On a ``Cluster`` a message between ranks of one host takes the numbers of ``same_host``, any other
those of ``other_host``. The ranks of a host share ``rails`` ports to others: where k messages of
one round can leave (or enter) it at once, a byte of them takes max(1, k / rails) times as long; a
rank has one port, so k counts the different ranks that send them, or take them in if those are
fewer. That is the fluid model: shares are equal and last for the whole round, there are no packets,
and between hosts nothing is in the way.

Windows: the ranks of one host at one memory; to wait for one another takes ``sync_s``, a byte read
or written ``seconds_per_byte``.

Schedules: a stage does its actions in their order, each as soon as what it needs has arrived.
Transfers take ``transfer`` seconds from the end of an action and keep nobody busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpmp.errors import ConfigError
from mpmp.programs.cluster import Cluster as Cluster
from mpmp.programs.cluster import Link as Link
from mpmp.programs.cluster import Memory as Memory
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.follow import follow_schedule, need, peak_live
from mpmp.programs.rounds import Chunks, Rounds
from mpmp.programs.steps import FORWARD, NONE, Action, Algorithm, Schedule
from mpmp.programs.windows import ALL, Await, Combine, Publish, WindowAlgorithm


def simulate_collective(
    algorithm: Algorithm, size: int, nbytes: int, cluster: Cluster | Link, **facts: Any
) -> float:
    """Seconds until the last of ``size`` ranks has ended, for a buffer of ``nbytes``.

    A ``Link`` joins all ranks alike. On a cluster ranks fill the hosts in order, unless the fact
    ``hosts`` places them. Facts that the algorithm does not take are left out.
    """
    hosts: Sequence[int] = ()
    if isinstance(cluster, Cluster):
        hosts = facts.setdefault("hosts", cluster.placement(size))
        if len(hosts) != size or not set(hosts) <= set(range(cluster.hosts)):
            raise ConfigError(
                f"hosts must give each of the {size} ranks a host below {cluster.hosts}; "
                f"it speaks of {len(hosts)} ranks on hosts {min(hosts)} to {max(hosts)}"
            )
    facts = algorithm.taken(facts)
    num_chunks = algorithm.num_chunks(size, **facts)
    # An all-to-all has an input and an output of n bytes in its buffer.
    copies = num_chunks // size if algorithm in COLLECTIVES.get("alltoall", {}).values() else 1
    chunks = Chunks(nbytes, num_chunks // copies, copies)
    clock = Rounds(size, cluster, hosts)
    for number, one in enumerate(algorithm.program(np.arange(size), size, **facts)):
        clock.play(number, one, chunks)
    return float(clock.now.max())


def simulate_window(
    algorithm: WindowAlgorithm, size: int, nbytes: int, memory: Memory, **facts: Any
) -> float:
    """Seconds until the last of ``size`` ranks of one host has ended, for ``nbytes`` a window."""
    facts = algorithm.taken(facts)
    chunks = Chunks(nbytes, algorithm.num_chunks(size, **facts))
    now = published = np.zeros(size)
    for step in algorithm.program(np.arange(size), size, **facts):
        if isinstance(step, Combine):
            touched = _windows(step.sum_from, size) + _windows(step.store_to, size)
            used = np.not_equal(step.store_to, NONE)
            now = now + used * touched * chunks.bytes_of(step) * memory.seconds_per_byte
        elif isinstance(step, Await):
            others = published.max() if np.all(step.source == ALL) else published[step.source]
            now = np.maximum(now, others) + memory.sync_s
        elif isinstance(step, Publish):
            published = now
    return float(now.max())


def _windows(named: Any, size: int) -> Any:
    """How many windows a word of a window program speaks of."""
    return np.where(np.equal(named, ALL), size, 1)


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
