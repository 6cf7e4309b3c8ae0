"""Where a rank's time went: computing, communicating, waiting in the pipeline's bubble.

Communication is the time spent in collectives (their additions included) and in waiting for
gradient sums that backward did not hide; bubble is the time a stage waits for its neighbours'
messages. What is left is computation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from mpmp.job.training import Training


@dataclass(frozen=True)
class Shares:
    """Seconds, and what part of them each kind took."""

    total_s: float
    communication_s: float
    bubble_s: float

    @property
    def compute_s(self) -> float:
        return max(0.0, self.total_s - self.communication_s - self.bubble_s)

    def part(self, seconds: float) -> float:
        return seconds / self.total_s if self.total_s > 0 else 0.0


class Stopwatch:
    """Reads the spent time off a training's groups; ``lap`` gives what passed since the last."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._last = self._read()

    def lap(self) -> Shares:
        now = self._read()
        passed = [new - old for new, old in zip(now, self._last, strict=True)]
        self._last = now
        return Shares(*passed)

    def _read(self) -> tuple[float, float, float]:
        mesh = self._training.mesh
        groups = (mesh.tensor, mesh.context, mesh.expert, mesh.model, mesh.everyone)
        communication = sum(group.spent_s for group in groups) + self._training.sharded.exposed_s
        return time.perf_counter(), communication, mesh.pipeline.spent_s
