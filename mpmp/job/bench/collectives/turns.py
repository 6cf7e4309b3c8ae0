"""Timing contenders in turns: batches of calls between two readings of the clock.

    repeat 1:  barrier, A A A A   barrier, B B   barrier, C
    repeat 2:  barrier, A A A A   barrier, B B   barrier, C      a batch lasts about a millisecond

Whatever else the machine does meets all of them. All ranks make the same number of calls: it
follows from times that all of them have seen. Where a collective lets a rank run ahead (broadcast,
reduce, gather, scatter) the calls of a batch overlap, for every contender alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import repeat

from mpmp.comm.group import Group
from mpmp.comm.world import World

BATCH_S = 1e-3
"""A batch lasts about that long: far above the resolution of a clock and the end of a barrier."""
_MOST_CALLS = 2000
_FEWEST_REPEATS = 3

Call = Callable[[], object]


def medians(
    calls: Sequence[Call], group: Group, world: World, repeats: int, seconds: float
) -> list[float]:
    """Seconds of a call of each contender: the median over repeats of the slowest rank's."""
    first = _slowest(world, [_batch(group, call, 1) for call in calls])
    warm = [max(1, min(100, int(BATCH_S / 4 / max(one, 1e-9)))) for one in first]
    per_call = _slowest(
        world, [_batch(group, call, times) for call, times in zip(calls, warm, strict=True)]
    )
    batches = [max(1, min(_MOST_CALLS, round(BATCH_S / max(one, 1e-9)))) for one in per_call]
    wanted = [
        max(_FEWEST_REPEATS, min(repeats, int(seconds / max(times * one, 1e-9))))
        for times, one in zip(batches, per_call, strict=True)
    ]
    wanted = [min(one, repeats) for one in wanted]
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(max(wanted, default=0)):
        for at, call in enumerate(calls):
            if number < wanted[at]:
                samples[at].append(_batch(group, call, batches[at]))
    flat = iter(_slowest(world, [time_s for one in samples for time_s in one]))
    return [statistics.median([next(flat) for _ in one]) for one in samples]


def _batch(group: Group, call: Call, times: int) -> float:
    """Seconds of one of ``times`` calls in a row, begun by all ranks together."""
    group.barrier()
    began = time.perf_counter()
    for _ in repeat(None, times):
        call()
    return (time.perf_counter() - began) / times


def _slowest(world: World, times: Sequence[float]) -> list[float]:
    """The longest of all ranks' times, each by its place; by the library, not by what is timed."""
    every = [json.loads(text) for text in world.gather_texts(json.dumps(list(times)))]
    return [max(one) for one in zip(*every, strict=True)]
