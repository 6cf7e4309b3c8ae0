"""When the ranks of a pipeline did what: the measured counterpart of a simulated timeline."""

from __future__ import annotations

import time

import torch

from mpmp.comm.mesh import Mesh
from mpmp.programs.steps import Schedule
from mpmp.programs.timeline import Span, Timeline


class Recorder:
    """Start and end of each action of this rank's last step, in seconds since all ranks began.

    An action starts when what it needs has arrived, so that waiting is idle time.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._group, self._device = mesh.pipeline, mesh.world.device
        self._began = 0.0
        self._starts: list[float] = []
        self._ends: list[float] = []

    def begin(self) -> None:
        """A step begins on all ranks together; the last one is forgotten."""
        self._group.barrier()
        self._starts, self._ends = [], []
        self._began = now(self._device)

    def start(self) -> None:
        """The next action has what it needs."""
        self._starts.append(now(self._device) - self._began)

    def end(self) -> None:
        """The action is done."""
        self._ends.append(now(self._device) - self._began)

    def timeline(self, schedule: Schedule, microbatches: int) -> Timeline:
        """The last step of all ranks; they call this together."""
        size = self._group.size
        actions = [schedule.actions(rank, size, microbatches) for rank in range(size)]
        own = torch.tensor([self._starts, self._ends], dtype=torch.float64).t().contiguous()
        times = self._group.allgather(own, [len(one) for one in actions]).tolist()
        named = [(rank, action) for rank, one in enumerate(actions) for action in one]
        spans = tuple(
            Span(rank, action, start, end)
            for (rank, action), (start, end) in zip(named, times, strict=True)
        )
        return Timeline(schedule, size, microbatches, spans)


def now(device: torch.device) -> float:
    """Seconds on this rank's clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
