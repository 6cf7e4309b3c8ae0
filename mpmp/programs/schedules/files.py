"""A schedule as a CSV file: written from any other, drawn up by hand, or by a solver.

    # mpmp schedule: ranks=2 microbatches=2 chunks=1 folded=no splits=no
    rank,slot,kind,microbatch,chunk
    0,0,F,0,0
    0,1,F,1,0          One line an action, kind F, B or W; slots are places in a rank's
    0,2,B,0,0          order. Two lines of one slot, an F and a B, are computed as one.
    ..

A file is for one number of ranks and one of microbatches. It is checked when it is read: whatever
could not work is refused with its line, or with the rank, the action and the reason.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mpmp.errors import ConfigError, InputOutputError
from mpmp.programs.check_schedules import check_schedule
from mpmp.programs.steps import BACKWARD, FORWARD, WEIGHT, Action, Actions, Fused, Schedule

MARK = "# mpmp schedule:"
COLUMNS = ("rank", "slot", "kind", "microbatch", "chunk")
FACTS = ("ranks", "microbatches", "chunks", "folded", "splits")
YES_NO = {"yes": 1, "no": 0}


def write(schedule: Schedule, ranks: int, microbatches: int, path: str | Path) -> None:
    """Write the actions of all ranks, after a check."""
    check_schedule(schedule, ranks, microbatches)
    words = [f"ranks={ranks} microbatches={microbatches} chunks={schedule.chunks}"]
    for fact in ("folded", "splits"):
        words.append(f"{fact}={'yes' if getattr(schedule, fact) else 'no'}")
    try:
        with open(path, "w", newline="") as file:
            file.write(f"{MARK} {' '.join(words)}\n")
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(COLUMNS)
            for rank in range(ranks):
                for slot, action in enumerate(schedule.actions(rank, ranks, microbatches)):
                    for part in action.parts:
                        rows.writerow((rank, slot, part.kind, part.microbatch, part.chunk))
    except OSError as error:
        raise InputOutputError(f"cannot write the schedule {path}: {error.strerror}") from None


def read(path: str | Path) -> Schedule:
    """The schedule that a file holds; a ConfigError or ProgramError says why it is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise InputOutputError(f"cannot read the schedule {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no schedule: it is not text") from None
    return _made(str(path), tuple(lines))


@cache
def _made(path: str, lines: tuple[str, ...]) -> Schedule:
    facts = _facts(path, lines[0] if lines else "")
    if len(lines) < 2 or lines[1] != ",".join(COLUMNS):
        raise ConfigError(f"{path}, line 2: must be {','.join(COLUMNS)}")
    ranks, microbatches = facts["ranks"], facts["microbatches"]
    table = _table(path, lines, ranks)

    def demand(wanted_ranks: int, wanted_microbatches: int) -> None:
        if (wanted_ranks, wanted_microbatches) != (ranks, microbatches):
            raise ConfigError(
                f"{path} is a schedule for {ranks} ranks and {microbatches} microbatches, not for "
                f"{wanted_ranks} and {wanted_microbatches}; set parallel.pipeline {ranks} and "
                f"parallel.microbatches {microbatches}, or write it for those"
            )

    schedule = Schedule(
        path,
        lambda rank, ranks, microbatches: iter(table[rank]),
        f"the file {path}",
        chunks=facts["chunks"],
        folded=bool(facts["folded"]),
        splits=bool(facts["splits"]),
        demand=demand,
    )
    check_schedule(schedule, ranks, microbatches)
    return schedule


def _facts(path: str, line: str) -> dict[str, int]:
    """What the first line says."""
    example = "ranks=4 microbatches=8 chunks=1 folded=no splits=no"
    found: dict[str, int] = {}
    for word in line.removeprefix(MARK).split():
        name, _, value = word.partition("=")
        if name in ("folded", "splits") and value in YES_NO:
            found[name] = YES_NO[value]
        elif name in FACTS[:3] and value.isdecimal() and int(value) >= 1:
            found[name] = int(value)
        else:
            found.clear()
            break
    if not line.startswith(MARK) or set(found) != set(FACTS):
        raise ConfigError(f"{path}, line 1: must have the form {MARK} {example}; it is {line!r}")
    return found


def _table(path: str, lines: tuple[str, ...], ranks: int) -> list[Actions]:
    """The actions of every rank, in the order of their slots."""
    slots: list[dict[int, list[Action]]] = [{} for _ in range(ranks)]
    for rank, slot, action, where in _rows(path, lines):
        if rank >= ranks:
            raise ConfigError(f"{where} rank {rank} is not one of the {ranks} ranks")
        together = slots[rank].setdefault(slot, [])
        together.append(action)
        if sorted(one.kind for one in together) not in (
            [action.kind],
            [BACKWARD, FORWARD],
        ):
            raise ConfigError(
                f"{where} slot {slot} of rank {rank} holds {together} and only one F and one B can "
                "be computed as one; give each action a slot of its own"
            )
    return [[_together(own[slot]) for slot in sorted(own)] for own in slots]


def _rows(path: str, lines: tuple[str, ...]) -> Iterator[tuple[int, int, Action, str]]:
    for number, fields in enumerate(csv.reader(lines[2:]), start=3):
        where = f"{path}, line {number}:"
        fields = [field.strip() for field in fields]
        if not fields:
            continue
        kinds = (FORWARD, BACKWARD, WEIGHT)
        numbers = fields[:2] + fields[3:]
        if len(fields) != 5 or fields[2] not in kinds or not all(map(str.isdecimal, numbers)):
            raise ConfigError(
                f"{where} must be {','.join(COLUMNS)}, kind F, B or W, the others whole numbers "
                f"from 0 on; it is {','.join(fields)!r}"
            )
        rank, slot, microbatch, chunk = map(int, numbers)
        yield rank, slot, Action(fields[2], microbatch, chunk), where


def _together(actions: list[Action]) -> Action | Fused:
    if len(actions) == 1:
        return actions[0]
    backward, forward = sorted(actions, key=lambda action: action.kind)
    return Fused(forward, backward)
