"""All ranks of a schedule at once: which action waits for which, and whether anyone waits for ever.

Stage s runs the forward of a microbatch when stage s-1 has, its backward when stage s+1 has (the
last stage: when its own forward is done), and the weight part of a backward after the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpmp.errors import ProgramError
from mpmp.programs.meeting import circle
from mpmp.programs.steps import (
    BACKWARD,
    FORWARD,
    WEIGHT,
    Action,
    Actions,
    Fused,
    Schedule,
)

Done = tuple[int, Action]
"""An action of a rank."""


def need(schedule: Schedule, ranks: int, rank: int, action: Action) -> Done | None:
    """The rank and the action whose result ``action`` takes; None where it takes none."""
    stage = schedule.stage_of(rank, action.chunk, ranks)
    if action.kind == WEIGHT:
        return rank, Action(BACKWARD, action.microbatch, action.chunk)
    before = stage - 1 if action.kind == FORWARD else stage + 1
    if before == ranks * schedule.chunks:
        return rank, Action(FORWARD, action.microbatch, action.chunk)
    if before < 0:
        return None
    peer, chunk = schedule.place_of(before, ranks)
    return peer, Action(action.kind, action.microbatch, chunk)


def follow_schedule(
    schedule: Schedule, ranks: int, microbatches: int
) -> Iterator[tuple[int, Action | Fused]]:
    """(rank, action) of all ranks, each after what it needs; a ProgramError where none can."""
    todo = [schedule.actions(rank, ranks, microbatches) for rank in range(ranks)]
    for rank, actions in enumerate(todo):
        _complete(schedule, rank, actions, microbatches)
    done: set[Done] = set()
    position = [0] * ranks
    while True:
        waits_for: dict[int, Done] = {}
        before = sum(position)
        for rank, actions in enumerate(todo):
            for action in actions[position[rank] :]:
                missing = _missing(schedule, ranks, rank, action, done)
                if missing:
                    waits_for[rank] = missing
                    break
                done.update((rank, part) for part in action.parts)
                position[rank] += 1
                yield rank, action
        if not waits_for:
            return
        if sum(position) == before:
            raise ProgramError(_stuck(todo, position, waits_for))


def _missing(
    schedule: Schedule, ranks: int, rank: int, action: Action | Fused, done: set[Done]
) -> Done | None:
    """The first thing that ``action`` needs and that is not done."""
    for part in action.parts:
        needed = need(schedule, ranks, rank, part)
        if needed is not None and needed not in done:
            return needed
    return None


def _stuck(todo: Sequence[Actions], position: Sequence[int], waits_for: dict[int, Done]) -> str:
    """The sentence for ranks that wait for ever: one that waits for itself, else the first."""
    alone = [rank for rank, (peer, _) in waits_for.items() if peer == rank]
    rank = min(alone or waits_for)
    peer, action = waits_for[rank]
    peers = {one: needed[0] for one, needed in waits_for.items()}
    who = f"{action} of rank {peer}" if peer != rank else f"its own {action}, which comes later"
    where = f"rank {rank}, action {position[rank]}: {todo[rank][position[rank]]}"
    round_trip = "" if peer == rank else circle(rank, peers, "ranks")
    return f"{where} waits for ever for {who}{round_trip}"


def _complete(schedule: Schedule, rank: int, actions: Actions, microbatches: int) -> None:
    """Refuse actions that are not each kind, once, for every microbatch and chunk."""
    kinds = (FORWARD, BACKWARD, WEIGHT) if schedule.splits else (FORWARD, BACKWARD)
    words = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    expected = {
        Action(kind, microbatch, chunk)
        for kind in kinds
        for chunk in range(schedule.chunks)
        for microbatch in range(microbatches)
    }
    seen: set[Action] = set()
    for place, action in enumerate(actions):
        for part in action.parts:
            where = f"rank {rank}, action {place}: {part}"
            if part not in expected:
                chunks = f" and {schedule.chunks} chunks" if schedule.chunks > 1 else ""
                raise ProgramError(
                    f"{where} is no {words} of the {microbatches} microbatches{chunks}"
                )
            if part in seen:
                raise ProgramError(f"{where} is done a second time")
            earlier = kinds[: kinds.index(part.kind)]
            for kind in earlier:
                if Action(kind, part.microbatch, part.chunk) not in seen:
                    what = "forward" if kind == FORWARD else "backward"
                    raise ProgramError(f"{where} comes before its {what}")
        # Of two that are computed as one neither is done before the other.
        seen.update(action.parts)
    if expected - seen:
        missing = ", ".join(sorted(map(repr, expected - seen)))
        raise ProgramError(
            f"rank {rank}, action {len(actions)}: the schedule ends without {missing}"
        )
