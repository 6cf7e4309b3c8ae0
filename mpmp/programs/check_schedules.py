"""Check: a schedule followed for all its ranks, proved complete and free of deadlock.

Proved is that every forward, backward and weight part is done once, in the order its microbatch
needs, and that no wait is cyclic. That is enough where a receive is posted before its rank blocks,
whatever the sends are: buffered, or finished only when they are received. How many receives must be
posted ahead for the worst kind of send is ``ahead``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from mpmp.errors import ProgramError
from mpmp.programs.follow_schedules import Done, follow_schedule, need
from mpmp.programs.steps import (
    BACKWARD,
    FORWARD,
    WEIGHT,
    Action,
    Actions,
    Fused,
    Schedule,
)


@dataclass(frozen=True, slots=True)
class ScheduleReport:
    """What was proved of a schedule; every tuple has one number a rank.

    A chunk's activations of one microbatch are the unit of memory: a rank's M_B is ``chunks`` of
    them. ``peak_live`` counts those whose backward is not done, ``peak_held`` those whose weight
    part is not done, too. ``sent`` counts the hidden states and gradients that go to other ranks.
    """

    name: str
    ranks: int
    microbatches: int
    chunks: int
    peak_live: tuple[int, ...]
    peak_held: tuple[int, ...]
    sent: tuple[int, ...]
    ahead: int
    """Receives to post ahead so that sends may block until they are received."""

    def sent_bytes(self, hidden_bytes: int) -> tuple[int, ...]:
        """Bytes each rank sends, if one microbatch's hidden states have ``hidden_bytes``."""
        return tuple(number * hidden_bytes for number in self.sent)


def check_schedule(schedule: Schedule, ranks: int, microbatches: int) -> ScheduleReport:
    """Prove the schedule, or raise a ProgramError with rank, action, reason."""
    actions: list[Actions] = [[] for _ in range(ranks)]
    try:
        for rank, action in follow_schedule(schedule, ranks, microbatches):
            actions[rank].append(action)
    except ProgramError as error:
        raise ProgramError(
            f"{schedule.name} on {ranks} ranks, {microbatches} microbatches: {error}"
        ) from None
    messages = _messages(schedule, ranks, actions)
    sent = [0] * ranks
    for rank, *_ in messages:
        sent[rank] += 1
    return ScheduleReport(
        schedule.name,
        ranks,
        microbatches,
        schedule.chunks,
        peak_live=tuple(int(peak(one, schedule.splits, 0)) for one in actions),
        peak_held=tuple(int(peak(one, schedule.splits, 1)) for one in actions),
        sent=tuple(sent),
        ahead=next(ahead for ahead in count() if _gets_through(actions, messages, ahead)),
    )


def peak(actions: Iterable[Action | Fused], splits: bool, kept: float) -> float:
    """The most memory a rank needs, in activations of one chunk for one microbatch.

    A forward adds 1. Its backward frees that; where it is split, the share ``kept`` (M_W / M_B)
    only with the weight part.
    """
    kept = kept if splits else 0
    frees = {FORWARD: -1.0, BACKWARD: 1 - kept, WEIGHT: kept}
    most = held = 0.0
    for action in actions:
        for part in action.parts:
            held -= frees[part.kind]
            most = max(most, held)
    return most


Message = tuple[int, int, int, int]
"""Sender, position of the action there, receiver, position of the action there."""


def _messages(schedule: Schedule, ranks: int, actions: Sequence[Actions]) -> list[Message]:
    """What goes from rank to rank."""
    position: dict[Done, int] = {
        (rank, part): place
        for rank, own in enumerate(actions)
        for place, action in enumerate(own)
        for part in action.parts
    }
    found = []
    for (rank, part), place in position.items():
        needed = need(schedule, ranks, rank, part)
        if needed is not None and needed[0] != rank:
            found.append((needed[0], position[needed], rank, place))
    return found


def _gets_through(actions: Sequence[Actions], messages: Iterable[Message], ahead: int) -> bool:
    """Whether all ranks end if a send blocks until its receive is posted.

    At the beginning of an action a rank posts the receives of that one and of the next ``ahead``.
    """
    ends = [len(own) for own in actions]
    wants: list[list[list[tuple[int, int]]]] = [[[] for _ in own] for own in actions]
    gives: list[list[list[tuple[int, int]]]] = [[[] for _ in own] for own in actions]
    for sender, at, receiver, place in messages:
        wants[receiver][place].append((sender, at))
        gives[sender][at].append((receiver, place))
    # An action is through when it is computed and its results are taken.
    computed, through = [0] * len(actions), [0] * len(actions)
    moved = True
    while moved:
        moved = False
        for rank, end in enumerate(ends):
            while through[rank] < end:
                at = through[rank]
                if computed[rank] == at:
                    if any(computed[peer] <= place for peer, place in wants[rank][at]):
                        break
                    computed[rank], moved = at + 1, True
                if any(through[peer] + ahead < place for peer, place in gives[rank][at]):
                    break
                through[rank], moved = at + 1, True
    return through == ends
