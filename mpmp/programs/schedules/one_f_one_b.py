"""1F1B: a backward as soon as there is one to do, so that few microbatches are alive.

    stage 0   F0 F1 F2       B0 F3 B1    B2    B3     bubble (p-1)/m of the ideal time,
    stage 1      F0 F1    B0 F2 B1 F3 B2    B3        as GPipe; stage s keeps at most p-s
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3           microbatches alive.

PipeDream-Flush in Narayanan et al. 2021.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpmp.programs.schedules.gpipe import bubble
from mpmp.programs.steps import BACKWARD, FORWARD, Action, Schedule


def program(rank: int, ranks: int, microbatches: int) -> Iterator[Action]:
    # Enough forwards to reach the last rank while the first backward comes back.
    warmup = min(ranks - rank - 1, microbatches)
    for microbatch in range(warmup):
        yield Action(FORWARD, microbatch)
    for microbatch in range(warmup, microbatches):
        yield Action(FORWARD, microbatch)
        yield Action(BACKWARD, microbatch - warmup)
    for microbatch in range(microbatches - warmup, microbatches):
        yield Action(BACKWARD, microbatch)


ONE_F_ONE_B = Schedule("1f1b", program, "Narayanan et al. 2021, PipeDream-Flush", bubble=bubble)
