"""Interleaved 1F1B: each rank holds several chunks of the model, so that the bubble is cut by them.

    rank 0   F0   F1   F0.1 F1.1 F2   B0.1 F3   B1.1 F2.1 B0   F3.1 B1        B2.1 ..
    rank 1        F0   F1   F0.1 B0.1 F1.1 B1.1 F2   B0   F3   B1   F2.1 B2.1 F3.1 ..

F0.1 is microbatch 0 on the rank's chunk 1. Bubble (p-1)/m/v of the ideal time for v chunks a rank;
v times as many messages; rank s keeps 2(p-s-1) + (v-1)p + 1 chunks' microbatches alive.

Microbatches go in groups of p through chunk 0, then chunk 1, and so on: stages lie in a loop. The
paper asks for m a multiple of p; else groups are longer than p here, at the same bubble.
Narayanan et al. 2021, section 2.2.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from mpmp.errors import ConfigError
from mpmp.programs.partition import partition
from mpmp.programs.steps import BACKWARD, FORWARD, Action, Schedule


def interleaved(chunks: int = 2) -> Schedule:
    """The schedule for so many chunks a rank."""
    if not isinstance(chunks, int) or chunks < 1:
        raise ConfigError(f"interleaved needs a whole number of chunks from 1 on, not {chunks}")
    return Schedule(
        "interleaved" if chunks == 2 else f"interleaved:chunks={chunks}",
        partial(program, chunks),
        "Narayanan et al. 2021",
        chunks=chunks,
        bubble=bubble,
    )


def program(chunks: int, rank: int, ranks: int, microbatches: int) -> Iterator[Action]:
    # Groups of fewer than p would leave ranks idle, so what is over makes groups longer.
    groups = partition(microbatches, max(microbatches // ranks, 1))
    order = [
        (number, chunk) for group in groups for chunk in range(chunks) for number in range(*group)
    ]
    # Until the first gradient is back: the way to the last rank, there and back, on every chunk.
    warmup = min(2 * (ranks - rank - 1) + (chunks - 1) * groups[0][1], len(order))
    for number, chunk in order[:warmup]:
        yield Action(FORWARD, number, chunk)
    for place in range(warmup, len(order)):
        number, chunk = order[place]
        yield Action(FORWARD, number, chunk)
        number, chunk = order[place - warmup]
        yield Action(BACKWARD, number, chunks - 1 - chunk)
    for number, chunk in order[len(order) - warmup :]:
        yield Action(BACKWARD, number, chunks - 1 - chunk)


def bubble(ranks: int, microbatches: int, forward: float, backward: float, weight: float) -> float:
    """Seconds that a rank is idle, of times of one chunk, from p microbatches on."""
    return (ranks - 1) * (forward + backward + weight)


INTERLEAVED = interleaved()
