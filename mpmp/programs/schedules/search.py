"""Search: a schedule made for measured times, a transfer time and a memory limit.

    order   the F and B of each rank, with fewer or more forwards before the first backward
    fill    every W goes where its rank would wait anyway, or where memory runs out (clock.py)
    climb   neighbouring F and B change places as long as the longest span of a rank falls

A heuristic, the same on every rank: the best of some hundred orders, each played once against the
clock, then improved step by step. On the times of Zero Bubble's table 5 it is nowhere worse than
what is printed there for that paper's own search, and nothing proves it the best there is.
After Qi et al. 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from math import floor

from mpmp.errors import ConfigError
from mpmp.programs.schedules.clock import EPSILON, Orders, Played, Step, Task, eager, fill
from mpmp.programs.schedules.zb_v import program as zb_v
from mpmp.programs.steps import BACKWARD, FORWARD, WEIGHT, Action, Schedule
from mpmp.programs.timeline import PerStage, Times

SLOPES = tuple(1 + tenth / 10 for tenth in range(21))
"""Forwards before the first backward that a rank has more than the rank behind it."""

BUDGETS = (0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0, 8.0)
"""Idle time that a rank may reach before a W delays what comes next, in F + B + W."""

CLIMBS, TRIES = 2, 600_000
"""Orders that are improved, and actions that this may play against the clock: about a second."""


def search(
    forward: PerStage = 1.0,
    backward: PerStage = 1.0,
    weight: PerStage = 1.0,
    transfer: float = 0.0,
    memory: PerStage | None = None,
    kept: float = 1.0,
    chunks: int = 1,
) -> Schedule:
    """The schedule for seconds of a stage (see ``Times``) and a memory limit.

    ``memory`` is the limit of each rank, one number or one a rank, in units of M_B, the activations
    of one microbatch on a whole rank; omitted: as many as there are ranks, what 1F1B needs.
    ``kept`` is the share of them that waits for W. ``chunks`` is 1, or 2 for a V.
    """
    if chunks not in (1, 2):
        raise ConfigError(f"search takes 1 chunk a rank, or 2 for a V, not {chunks}")
    if not 0 <= kept <= 1:
        raise ConfigError(f"kept is the share of memory that waits for W, 0 to 1, not {kept}")
    forward, backward, weight = map(_fixed, (forward, backward, weight))
    memory = None if memory is None else _fixed(memory)
    times = Times(forward, backward, weight, transfer)

    def program(rank: int, ranks: int, microbatches: int) -> Iterator[Action]:
        task = _task(times, memory, kept, chunks, ranks, microbatches)
        return iter(_found(task).actions[rank])

    return Schedule(
        "search",
        program,
        "search after Qi et al. 2023",
        chunks=chunks,
        folded=chunks == 2,
        splits=True,
    )


def _fixed(number: PerStage) -> PerStage:
    return tuple(number) if isinstance(number, Sequence) else number


def _task(
    times: Times, memory: PerStage | None, kept: float, chunks: int, ranks: int, microbatches: int
) -> Task:
    if memory is None:
        memory = float(ranks)
    limits = tuple(memory) if isinstance(memory, Sequence) else (memory,) * ranks
    if len(limits) != ranks or min(limits) < 1:
        raise ConfigError(
            f"memory must be 1 (a microbatch) or more on each of the {ranks} ranks, not "
            f"{'/'.join(map(str, limits))}; raise it and cut the batch into more microbatches"
        )
    seconds = [
        tuple(times.of(stage, kind, True) for kind in (FORWARD, BACKWARD, WEIGHT))
        for stage in range(ranks * chunks)
    ]
    if min(map(min, seconds)) <= 0 or times.transfer < 0:
        raise ConfigError(
            "seconds must be positive, and those of a transfer 0 or more; give the measured ones"
        )
    return Task(ranks, microbatches, chunks, tuple(seconds), times.transfer, limits, kept)


SEARCH = search()


# --- the search -----------------------------------------------------------------------------------


@cache
def _found(task: Task) -> Played:
    """The best that was found; the same wherever it is computed."""
    mean = sum(map(sum, task.seconds)) / task.ranks
    found: list[tuple[float, int, Orders, float]] = []
    for number, begin in enumerate(_begins(task)):
        for share in BUDGETS:
            played = fill(task, begin, share * mean)
            if played:
                found.append((played.cost, number, begin, share * mean))
    found.sort(key=lambda one: one[:2])
    # The best beginnings often end in the same place: others get a chance, too.
    climbed = [_climb(task, order, budget) for _, _, order, budget in found[:CLIMBS]]
    return min(climbed, key=lambda one: one.cost)


def _begins(task: Task) -> Iterator[Orders]:
    """Orders of F and B to begin with."""
    m, ranks = task.microbatches, range(task.ranks)
    if task.chunks == 1:
        for slope in SLOPES:
            ahead = (floor(1 + slope * (task.ranks - 1 - rank) + EPSILON) for rank in ranks)
            fits = (min(n, m, floor(task.limits[rank])) for rank, n in enumerate(ahead))
            # More than the rank in front of it no rank can be ahead.
            yield [_one_by_one(n, m) for n in accumulate(fits, min)]
        return
    there_and_back = (
        (part for action in zb_v(r, task.ranks, m) for part in action.parts) for r in ranks
    )
    yield [[(a.kind, a.chunk) for a in own if a.kind != WEIGHT] for own in there_and_back]
    least = floor(min(task.limits))
    for cap in sorted({least, floor(1.25 * least), floor(1.5 * least)}):
        for first in (FORWARD, BACKWARD):
            for patience in (0.0, 0.5, 1.0):
                played = eager(task, cap, first, patience)
                if played:
                    yield played.steps()


def _one_by_one(ahead: int, microbatches: int) -> list[Step]:
    """So many forwards, then a backward and a forward in turn."""
    forward, backward = (FORWARD, 0), (BACKWARD, 0)
    steady = [backward, forward] * (microbatches - ahead)
    return [forward] * ahead + steady + [backward] * ahead


def _climb(task: Task, order: Orders, budget: float) -> Played:
    """Let neighbouring F and B change places while that helps."""
    order = [list(steps) for steps in order]
    best = fill(task, order, budget)
    assert best is not None, "an order that went through before"
    tries = TRIES // (CLIMBS * 3 * task.microbatches * task.ranks * task.chunks)
    least = task.microbatches * sum(map(sum, task.seconds)) / task.ranks
    better = True
    while better and best.cost > least + EPSILON:
        better = False
        for steps in order:
            for place in range(len(steps) - 1):
                if steps[place] == steps[place + 1]:
                    continue
                if tries == 0:
                    return best
                tries -= 1
                steps[place : place + 2] = steps[place + 1], steps[place]
                played = fill(task, order, budget)
                if played and played.cost < best.cost - EPSILON:
                    best, better = played, True
                else:
                    steps[place : place + 2] = steps[place + 1], steps[place]
    return best
