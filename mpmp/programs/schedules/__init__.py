"""The pipeline schedules: one file a schedule, one line in this table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from mpmp.errors import ConfigError
from mpmp.programs.schedules.dualpipe_v import DUALPIPE_V
from mpmp.programs.schedules.files import read
from mpmp.programs.schedules.gpipe import GPIPE
from mpmp.programs.schedules.interleaved import INTERLEAVED, interleaved
from mpmp.programs.schedules.one_f_one_b import ONE_F_ONE_B
from mpmp.programs.schedules.search import SEARCH, search
from mpmp.programs.schedules.zb_h1 import ZB_H1
from mpmp.programs.schedules.zb_v import ZB_V
from mpmp.programs.steps import Schedule
from mpmp.programs.tables import look_up

SCHEDULES: dict[str, Schedule] = {
    one.name: one for one in (GPIPE, ONE_F_ONE_B, INTERLEAVED, ZB_H1, ZB_V, DUALPIPE_V, SEARCH)
}

MADE: dict[str, Callable[..., Schedule]] = {"interleaved": interleaved, "search": search}
"""Schedules that take facts: ``interleaved:chunks=4``."""


def find(name: str) -> Schedule:
    """The schedule ``name``, ``name:fact=value,..`` or ``FILE.csv``.

    A ConfigError names the nearest known schedule or fact.
    """
    if name.endswith(".csv"):
        return read(name)
    word, colon, facts = name.partition(":")
    schedule = look_up(SCHEDULES, word, "schedule")
    if not colon:
        return schedule
    if word not in MADE:
        raise ConfigError(
            f'the schedule "{word}" takes no facts; those that do: {", ".join(MADE)}; leave out '
            f'"{colon}{facts}"'
        )
    make = MADE[word]
    known = dict(inspect.signature(make).parameters)
    given = {}
    for fact in facts.split(","):
        left, _, right = fact.partition("=")
        look_up(known, left, f"fact of the schedule {word}:")
        given[left] = _value(fact, right)
    return replace(make(**given), name=name)


def _value(fact: str, text: str) -> int | float | tuple[float, ...]:
    """A number, or one a stage: ``1/1.5/1``."""
    try:
        if text.isdecimal():
            return int(text)
        numbers = tuple(float(one) for one in text.split("/"))
    except ValueError:
        raise ConfigError(
            f'"{fact}" must have the form fact=number, or fact=1/2/1.5 with a number for each stage'
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
