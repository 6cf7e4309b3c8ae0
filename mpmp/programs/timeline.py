"""Simulate: when every rank of a pipeline does what, for given times of its stages.

A rank does its actions in their order, each as soon as what it needs has arrived. What goes to
another rank arrives ``transfer`` seconds after its action has ended. Meanwhile the sender goes on,
as in the tables of Zero Bubble (Qi et al. 2023), or, where transfers are ``blocking``, is kept by
each of its sends. Between chunks of one rank nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpmp.errors import ConfigError
from mpmp.programs.check_schedules import peak
from mpmp.programs.follow_schedules import Done, follow_schedule, need
from mpmp.programs.steps import BACKWARD, FORWARD, WEIGHT, Action, Fused, Schedule

PerStage = float | Sequence[float]
"""One number for all stages, or one a stage."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one microbatch on a stage; ``transfer`` of what goes to another rank.

    ``backward`` is the gradient of the input and ``weight`` that of the weights: a schedule that
    does not split them takes their sum for a B. ``fused`` is a forward and a backward computed as
    one; omitted: their sum. A rank that holds v chunks of a model holds v stages, each a v-th of
    what it would be with one: see ``cut``.
    """

    forward: PerStage = 1.0
    backward: PerStage = 1.0
    weight: PerStage = 0.0
    transfer: float = 0.0
    fused: PerStage | None = None
    blocking: bool = False

    def cut(self, chunks: int) -> Times:
        """The times where the same model is cut into ``chunks`` times as many stages."""

        def part(time: PerStage) -> PerStage:
            if isinstance(time, Sequence):
                raise ConfigError(
                    "times that differ from stage to stage cannot be cut into chunks; give one "
                    "number for each chunk"
                )
            return time / chunks

        fused = None if self.fused is None else part(self.fused)
        return Times(
            part(self.forward),
            part(self.backward),
            part(self.weight),
            self.transfer,
            fused,
            self.blocking,
        )

    def of(self, stage: int, kind: str, splits: bool) -> float:
        """Seconds of an action of ``kind`` on ``stage``."""
        if kind == FORWARD:
            return _one(self.forward, stage)
        if kind == WEIGHT:
            return _one(self.weight, stage)
        whole = 0.0 if splits else _one(self.weight, stage)
        return _one(self.backward, stage) + whole


def _one(times: PerStage, stage: int) -> float:
    if not isinstance(times, Sequence):
        return times
    if stage >= len(times):
        raise ConfigError(
            f"times of {len(times)} stages were given and there is a stage {stage}; give one "
            "number for each stage, or one for all"
        )
    return times[stage]


@dataclass(frozen=True, slots=True)
class Span:
    """One action of one rank, from start to end in seconds."""

    rank: int
    action: Action | Fused
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """When every rank does what."""

    schedule: Schedule
    ranks: int
    microbatches: int
    spans: tuple[Span, ...]

    def of(self, rank: int) -> list[Span]:
        """The spans of one rank in their order."""
        return [span for span in self.spans if span.rank == rank]

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def work(self) -> tuple[float, ...]:
        """Seconds that each rank computes."""
        return tuple(sum(span.end - span.start for span in self.of(r)) for r in range(self.ranks))

    @property
    def bubble(self) -> float:
        """Idle share of the time of all ranks: (p-1)/(m+p-1) in Huang et al. 2019."""
        total = self.ranks * self.makespan
        return (total - sum(self.work)) / total if total else 0.0

    @property
    def bubble_over_ideal(self) -> float:
        """Idle over busy time of all ranks: (p-1)/m in Narayanan et al. 2021."""
        busy = sum(self.work)
        return (self.ranks * self.makespan - busy) / busy if busy else 0.0

    @property
    def cost(self) -> float:
        """The longest span of a rank from its first start to its last end, in seconds.

        Steps follow one another: what a rank waits before its first action overlaps with the step
        before, as far as the optimiser allows it (Qi et al. 2023).
        """
        spans = (self.of(rank) for rank in range(self.ranks))
        return max((own[-1].end - own[0].start for own in spans if own), default=0.0)

    @property
    def bubble_rate(self) -> float:
        """Idle share of the longest span: (cost - m (F+B+W)) / cost in Qi et al. 2023."""
        return 1 - max(self.work) / self.cost if self.cost else 0.0

    @property
    def peak_live(self) -> tuple[int, ...]:
        """The most microbatches of a chunk whose backward is not done, of each rank."""
        return tuple(int(self._peak(rank, 0.0)) for rank in range(self.ranks))

    def peak_memory(self, kept: float) -> tuple[float, ...]:
        """The most memory of each rank in units of M_B; ``kept`` is the share that waits for W."""
        chunks = self.schedule.chunks
        return tuple(self._peak(rank, kept) / chunks for rank in range(self.ranks))

    def _peak(self, rank: int, kept: float) -> float:
        return peak((span.action for span in self.of(rank)), self.schedule.splits, kept)


def simulate_schedule(
    schedule: Schedule, ranks: int, microbatches: int, times: Times | None = None
) -> Timeline:
    """The timeline of all ranks; without ``times`` every action takes one unit (W none)."""
    times = times or Times(weight=1.0 if schedule.splits else 0.0)
    done: dict[Done, float] = {}
    free = [0.0] * ranks
    spans = []
    for rank, action in follow_schedule(schedule, ranks, microbatches):
        start = free[rank]
        for part in action.parts:
            needed = need(schedule, ranks, rank, part)
            if needed is not None:
                way = times.transfer if needed[0] != rank else 0.0
                start = max(start, done[needed] + way)
        end = start + _seconds(schedule, ranks, rank, action, times)
        free[rank] = end
        spans.append(Span(rank, action, start, end))
        for part in action.parts:
            done[rank, part] = end
            if times.blocking and _leaves(schedule, ranks, rank, part):
                free[rank] += times.transfer
    return Timeline(schedule, ranks, microbatches, tuple(spans))


def _seconds(
    schedule: Schedule, ranks: int, rank: int, action: Action | Fused, times: Times
) -> float:
    stages = [schedule.stage_of(rank, part.chunk, ranks) for part in action.parts]
    if isinstance(action, Fused) and times.fused is not None:
        return _one(times.fused, stages[0])
    kinds = (part.kind for part in action.parts)
    return sum(
        times.of(stage, kind, schedule.splits) for stage, kind in zip(stages, kinds, strict=True)
    )


def _leaves(schedule: Schedule, ranks: int, rank: int, part: Action) -> bool:
    """Whether the result of an action goes to another rank."""
    stage = schedule.stage_of(rank, part.chunk, ranks)
    takes = stage + 1 if part.kind == FORWARD else stage - 1 if part.kind == BACKWARD else -1
    if not 0 <= takes < ranks * schedule.chunks:
        return False
    return schedule.place_of(takes, ranks)[0] != rank
