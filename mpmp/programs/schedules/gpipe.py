"""GPipe: all microbatches forward, then all backward.

    stage 0   F0 F1 F2 F3             B0 B1 B2 B3     bubble (p-1)/(m+p-1) of the time,
    stage 1      F0 F1 F2 F3       B0 B1 B2 B3        all m microbatches alive at the turn.
    stage 2         F0 F1 F2 F3 B0 B1 B2 B3

The backwards go in the order of the forwards, as in 1F1B, so that gradients are summed in the
same order under both schedules; the paper draws them reversed, which costs the same.
Huang et al. 2019.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpmp.programs.steps import BACKWARD, FORWARD, Action, Schedule


def program(rank: int, ranks: int, microbatches: int) -> Iterator[Action]:
    for microbatch in range(microbatches):
        yield Action(FORWARD, microbatch)
    for microbatch in range(microbatches):
        yield Action(BACKWARD, microbatch)


def bubble(ranks: int, microbatches: int, forward: float, backward: float, weight: float) -> float:
    """Seconds that a rank is idle."""
    return (ranks - 1) * (forward + backward + weight)


GPIPE = Schedule("gpipe", program, "Huang et al. 2019", bubble=bubble)
