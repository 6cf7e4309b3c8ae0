"""Schedules: their pictures, their bubbles, their memory, and the broken ones refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from mpmp.errors import ConfigError, ProgramError
from mpmp.programs.check import check_schedule
from mpmp.programs.draw import draw
from mpmp.programs.schedules import SCHEDULES, find
from mpmp.programs.schedules.gpipe import gpipe
from mpmp.programs.schedules.one_f_one_b import one_f_one_b
from mpmp.programs.simulate import Times, simulate_schedule
from mpmp.programs.steps import Action, Schedule

GRID = [(p, m) for p in (1, 2, 3, 4, 7, 8) for m in (1, 2, 3, 4, 8, 13)]
grid = pytest.mark.parametrize(("p", "m"), GRID)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def test_picture_of_1f1b() -> None:
    assert draw(simulate_schedule(one_f_one_b, stages=3, microbatches=4)) == (
        """\
F0 F1 F2       B0 F3 B1    B2    B3
   F0 F1    B0 F2 B1 F3 B2    B3
      F0 B0 F1 B1 F2 B2 F3 B3"""
    )


def test_picture_of_gpipe() -> None:
    assert draw(simulate_schedule(gpipe, stages=3, microbatches=4)) == (
        """\
F0 F1 F2 F3             B0 B1 B2 B3
   F0 F1 F2 F3       B0 B1 B2 B3
      F0 F1 F2 F3 B0 B1 B2 B3"""
    )


def test_picture_of_fewer_microbatches_than_stages() -> None:
    assert draw(simulate_schedule(one_f_one_b, stages=4, microbatches=2)) == (
        """\
F0 F1                B0    B1
   F0 F1          B0    B1
      F0 F1    B0    B1
         F0 B0 F1 B1"""
    )


def test_picture_of_a_backward_twice_as_long() -> None:
    assert draw(simulate_schedule(one_f_one_b, 2, 3, Times(forward=0.5, backward=1.0))) == (
        """\
F0 F1       B0 -- F2 B1 --    B2 --
   F0 B0 -- F1 B1 -- F2 B2 --"""
    )


def test_columns_fit_the_longest_number() -> None:
    lines = draw(simulate_schedule(gpipe, stages=2, microbatches=11)).splitlines()
    assert lines[0].startswith("F0  F1  F2 ")
    assert lines[1].endswith(" B9  B10")


@every_schedule
@grid
def test_bubble_and_makespan(schedule: Schedule, p: int, m: int) -> None:
    """GPipe's (p-1)/(m+p-1) of the time, which is (p-1)/m of the ideal time, holds for both."""
    timeline = simulate_schedule(schedule, p, m, Times(forward=2, backward=3, weight=1.5))
    assert timeline.makespan == pytest.approx((m + p - 1) * 6.5)
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert timeline.bubble_over_ideal == pytest.approx((p - 1) / m)


@grid
def test_microbatches_alive(p: int, m: int) -> None:
    assert check_schedule(gpipe, p, m).peak_live == (m,) * p
    assert check_schedule(one_f_one_b, p, m).peak_live == tuple(min(p - s, m) for s in range(p))
    for schedule in SCHEDULES.values():
        timeline = simulate_schedule(schedule, p, m)
        assert timeline.peak_live == check_schedule(schedule, p, m).peak_live


@every_schedule
@grid
def test_timeline_keeps_order_and_needs(schedule: Schedule, p: int, m: int) -> None:
    times = Times(forward=[1 + s / 3 for s in range(p)], backward=2, transfer=0.25)
    timeline = simulate_schedule(schedule, p, m, times)
    when = {(span.stage, span.action): span for span in timeline.spans}
    assert len(when) == 2 * p * m
    for stage in range(p):
        spans = timeline.of(stage)
        assert [span.action for span in spans] == list(schedule(stage, p, m))
        assert all(one.end <= other.start for one, other in pairwise(spans))
    for (stage, action), span in when.items():
        before = when.get((stage + (-1 if action.kind == "F" else 1), action))
        assert before is None or span.start >= before.end + 0.25


def test_the_slowest_stage_sets_the_pace() -> None:
    """1F1B takes (m-1) max + sum where the last stage is the slowest.

    An earlier one does its next forward while the first microbatch is beyond it, and is idle only
    before its first forward and after its last backward: the formula is then an upper bound.
    """
    m = 10
    for slowest in range(4):
        forward, backward = [1.0] * 4, [2.0] * 4
        forward[slowest], backward[slowest] = 4.0, 5.0
        makespan = simulate_schedule(one_f_one_b, 4, m, Times(forward, backward)).makespan
        assert makespan == m * 9 + slowest * 3
        published = (m - 1) * 9 + sum(forward) + sum(backward)
        assert makespan == published if slowest == 3 else makespan < published


def test_transfers_lengthen_a_lone_microbatch_by_the_way_there_and_back() -> None:
    assert simulate_schedule(gpipe, 4, 1, Times(transfer=0.5)).makespan == 8 + 2 * 3 * 0.5


def broken(changes: dict[int, str]) -> Schedule:
    """GPipe with the actions of some stages written out."""

    def schedule(stage: int, stages: int, microbatches: int) -> Iterator[Action]:
        if stage not in changes:
            yield from gpipe(stage, stages, microbatches)
        for word in changes.get(stage, "").split():
            yield Action(word[0], int(word[1:]))

    return schedule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: "F0 F1 B0"}, "stage 1, action 3: the schedule ends without B1"),
        ({1: "F0 F1 F0 B0 B1"}, "stage 1, action 2: F0 is done a second time"),
        ({0: "F0 B1 F1 B0"}, "stage 0, action 1: B1 comes before its forward"),
        ({0: "F0 F1 F2 B0 B1"}, "stage 0, action 2: F2 is no F or B of the 2 microbatches"),
        ({0: "F0 F1 W0 B0 B1"}, "stage 0, action 2: W0 is no F or B of the 2 microbatches"),
        (
            {0: "F0 B0 F1 B1"},
            "stage 0, action 1: B0 waits for ever for stage 1; stages 0 -> 1 -> 0 wait for one",
        ),
        (
            {0: "F1 F0 B0 B1", 1: "F0 B0 F1 B1", 2: "F1 B1 F0 B0"},
            "stage 0, action 2: B0 waits for ever for stage 1; stages 1 -> 2 -> 1 wait",
        ),
    ],
)
def test_a_broken_schedule_is_refused(changes: dict[int, str], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        check_schedule(broken(changes), 3, 2)
    with pytest.raises(ProgramError, match=message):
        simulate_schedule(broken(changes), 3, 2)


def test_an_unknown_schedule_is_told_the_nearest() -> None:
    assert find("1f1b") is one_f_one_b
    with pytest.raises(ConfigError, match='no schedule "1b1f"; did you mean "1f1b"; known: gpipe'):
        find("1b1f")
