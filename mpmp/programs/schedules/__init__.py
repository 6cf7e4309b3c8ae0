"""The pipeline schedules: one file a schedule, one line in this table."""

from __future__ import annotations

from mpmp.programs.schedules.gpipe import gpipe
from mpmp.programs.schedules.one_f_one_b import one_f_one_b
from mpmp.programs.steps import Schedule
from mpmp.programs.tables import look_up

SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
}


def find(name: str) -> Schedule:
    """The schedule ``name``; a ConfigError names the nearest known one."""
    return look_up(SCHEDULES, name, "schedule")
