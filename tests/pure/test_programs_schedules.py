"""Schedules: their pictures, their bubbles, their memory, and the broken ones refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmp.errors import ConfigError, ProgramError
from mpmp.programs.check_schedules import check_schedule
from mpmp.programs.draw import draw
from mpmp.programs.follow_schedules import need
from mpmp.programs.schedules import SCHEDULES, find
from mpmp.programs.schedules.interleaved import interleaved
from mpmp.programs.steps import BACKWARD, FORWARD, Action, Actions, Fused, Schedule
from mpmp.programs.timeline import Times, simulate_schedule

GPIPE, ONE_F_ONE_B, ZB_H1 = SCHEDULES["gpipe"], SCHEDULES["1f1b"], SCHEDULES["zb_h1"]
ZB_V, DUALPIPE_V = SCHEDULES["zb_v"], SCHEDULES["dualpipe_v"]
EVERY = [*SCHEDULES.values(), interleaved(1), interleaved(4)]

GRID = [(p, m) for p in (1, 2, 3, 4, 7, 8) for m in (1, 2, 3, 4, 8, 13)]
grid = pytest.mark.parametrize(("p", "m"), GRID)
every_schedule = pytest.mark.parametrize("schedule", EVERY, ids=lambda one: one.name)
ranges = {"p": st.integers(1, 9), "m": st.integers(1, 25)}


@pytest.fixture(autouse=True, scope="module")
def search_in_no_time() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["mpmp.programs.schedules.search"], "TRIES", 0)
        yield


# --- pictures -----------------------------------------------------------------------------------


def test_picture_of_1f1b() -> None:
    assert draw(simulate_schedule(ONE_F_ONE_B, 3, 4)) == (
        """\
F0 F1 F2       B0 F3 B1    B2    B3
   F0 F1    B0 F2 B1 F3 B2    B3
      F0 B0 F1 B1 F2 B2 F3 B3"""
    )


def test_picture_of_gpipe() -> None:
    assert draw(simulate_schedule(GPIPE, 3, 4)) == (
        """\
F0 F1 F2 F3             B0 B1 B2 B3
   F0 F1 F2 F3       B0 B1 B2 B3
      F0 F1 F2 F3 B0 B1 B2 B3"""
    )


def test_picture_of_interleaved() -> None:
    assert draw(simulate_schedule(SCHEDULES["interleaved"], 2, 4)) == (
        """\
F0   F1   F0.1 F1.1 F2   B0.1 F3   B1.1 F2.1 B0   F3.1 B1        B2.1      B3.1 B2   B3
     F0   F1   F0.1 B0.1 F1.1 B1.1 F2   B0   F3   B1   F2.1 B2.1 F3.1 B3.1 B2   B3"""
    )


def test_picture_of_zb_h1() -> None:
    assert draw(simulate_schedule(ZB_H1, 3, 4)) == (
        """\
F0 F1 F2       B0 W0 F3 B1 W1 B2 W2 B3 W3
   F0 F1    B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
      F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"""
    )


def test_picture_of_zb_v() -> None:
    assert draw(simulate_schedule(ZB_V, 2, 4)) == (
        """\
F0   F1   F2   F0.1 B0.1 W0.1 F1.1 B1.1 W1.1 F3   B0   W0   F2.1 B2.1 W2.1 B1   W1   F3.1 B3.1 W3.1 B2   W2   B3   W3
     F0   F0.1 F1   F1.1 B0.1 W0.1 F2   B0   W0   F2.1 B1.1 W1.1 F3   B1   W1   F3.1 B2.1 W2.1 B2   B3.1 B3   W2   W3.1 W3"""  # noqa: E501
    )


def test_picture_of_dualpipe_v() -> None:
    """A fused pair takes two columns, its name both."""
    assert draw(simulate_schedule(DUALPIPE_V, 2, 4)) == (
        """\
F0   F1   F2   F0.1 B0.1 W0.1 F1.1 F3&B1.1   W1.1 F2.1&B0   W0   B2.1 W2.1      F3.1&B1   W1   B3.1 W3.1 B2   W2   B3   W3
     F0   F0.1 F1   F1.1 F2   B0.1 W0.1 F2.1&B0   W0   F3&B1.1   W1.1 F3.1&B1   W1   B2.1 W2.1 B2   W2   B3.1 B3   W3.1 W3"""  # noqa: E501
    )


def test_picture_of_fewer_microbatches_than_ranks() -> None:
    assert draw(simulate_schedule(ONE_F_ONE_B, 4, 2)) == (
        """\
F0 F1                B0    B1
   F0 F1          B0    B1
      F0 F1    B0    B1
         F0 B0 F1 B1"""
    )


def test_picture_of_a_backward_twice_as_long() -> None:
    assert draw(simulate_schedule(ONE_F_ONE_B, 2, 3, Times(forward=0.5, backward=1.0))) == (
        """\
F0 F1       B0 -- F2 B1 --    B2 --
   F0 B0 -- F1 B1 -- F2 B2 --"""
    )


def test_actions_that_take_no_time_are_not_drawn() -> None:
    picture = draw(simulate_schedule(ZB_H1, 2, 2, Times(forward=1, backward=1)))
    assert picture == "F0 F1 B0    B1\n   F0 B0 F1 B1".replace("B0    B1", "   B0    B1", 1)
    assert draw(simulate_schedule(GPIPE, 1, 1, Times(0, 0))) == ""


def test_columns_fit_the_longest_number() -> None:
    lines = draw(simulate_schedule(GPIPE, 2, 11)).splitlines()
    assert lines[0].startswith("F0  F1  F2 ")
    assert lines[1].endswith(" B9  B10")


# --- every schedule, every number of ranks and microbatches ---------------------------------------


@every_schedule
@settings(max_examples=15)
@given(**ranges)
def test_every_schedule_is_complete_and_free_of_deadlock(
    schedule: Schedule, p: int, m: int
) -> None:
    report = check_schedule(schedule, p, m)
    assert report.peak_live == simulate_schedule(schedule, p, m).peak_live
    assert max(report.peak_live) <= m * schedule.chunks
    # Hidden states and gradients cross each border between different ranks once a microbatch.
    stages = range(p * schedule.chunks)
    homes = [schedule.place_of(stage, p)[0] for stage in stages]
    borders = [pair for pair in pairwise(homes) if pair[0] != pair[1]]
    sent = [m * sum(rank in pair for pair in borders) for rank in range(p)]
    assert report.sent == tuple(sent)
    assert report.sent_bytes(64) == tuple(64 * number for number in sent)
    for stage in stages:
        rank, chunk = schedule.place_of(stage, p)
        assert schedule.stage_of(rank, chunk, p) == stage


@every_schedule
@grid
def test_timeline_keeps_order_and_needs(schedule: Schedule, p: int, m: int) -> None:
    stages = p * schedule.chunks
    times = Times([1 + s / 3 for s in range(stages)], 2, 0.75, transfer=0.25)
    timeline = simulate_schedule(schedule, p, m, times)
    when = {(span.rank, part): span for span in timeline.spans for part in span.action.parts}
    assert len(when) == (3 if schedule.splits else 2) * stages * m
    for rank in range(p):
        spans = timeline.of(rank)
        assert [span.action for span in spans] == schedule.actions(rank, p, m)
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(spans))
    for (rank, part), span in when.items():
        needed = need(schedule, p, rank, part)
        if needed is not None:
            way = 0.25 if needed[0] != rank else 0.0
            assert span.start >= when[needed].end + way - 1e-9


@given(**ranges)
def test_the_order_of_microbatches_is_the_same_in_all(p: int, m: int) -> None:
    """Gradients of a weight are summed in one order, whatever the schedule: so are their bits."""
    for schedule in EVERY[:6]:
        for rank in range(p):
            done: dict[tuple[str, int], int] = {}
            for action in schedule.actions(rank, p, m):
                for part in action.parts:
                    key = part.kind, part.chunk
                    assert done.setdefault(key, 0) == part.microbatch
                    done[key] += 1


# --- bubbles and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [GPIPE, ONE_F_ONE_B], ids=["gpipe", "1f1b"])
@grid
def test_bubble_and_makespan(schedule: Schedule, p: int, m: int) -> None:
    """GPipe's (p-1)/(m+p-1) of the time, which is (p-1)/m of the ideal time, holds for both."""
    timeline = simulate_schedule(schedule, p, m, Times(forward=2, backward=3, weight=1.5))
    assert timeline.makespan == pytest.approx((m + p - 1) * 6.5)
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert timeline.bubble_over_ideal == pytest.approx((p - 1) / m)


@settings(max_examples=25)
@given(p=st.integers(1, 8), more=st.integers(0, 20), chunks=st.integers(1, 4))
def test_bubble_of_interleaved_is_cut_by_the_chunks(p: int, more: int, chunks: int) -> None:
    """(p-1)/m/v of the ideal time, where p divides m (the paper's rule) and where it does not."""
    m = p + more
    times = Times(forward=2, backward=3, weight=1).cut(chunks)
    timeline = simulate_schedule(interleaved(chunks), p, m, times)
    assert timeline.bubble_over_ideal == pytest.approx((p - 1) / m / chunks)


@pytest.mark.parametrize("times", [(1, 1, 1), (1.0, 1.25, 0.75), (10.0, 9.5, 7.0)], ids=str)
@settings(max_examples=25)
@given(p=st.integers(1, 8), more=st.integers(0, 20))
def test_bubbles_are_those_published(times: tuple[float, float, float], p: int, more: int) -> None:
    m = p + more
    for schedule in (GPIPE, ONE_F_ONE_B, ZB_H1, SCHEDULES["interleaved"]):
        timeline = simulate_schedule(schedule, p, m, Times(*times))
        assert schedule.bubble is not None
        idle = timeline.cost - max(timeline.work)
        assert idle == pytest.approx(schedule.bubble(p, m, *times), abs=1e-9)


@pytest.mark.parametrize("times", [(1, 1, 1), (1.0, 1.25, 0.75), (10.0, 9.5, 7.0)], ids=str)
@settings(max_examples=25)
@given(p=st.integers(1, 8), more=st.integers(0, 10))
def test_the_bubble_of_dualpipe_v_is_below_the_published(
    times: tuple[float, float, float], p: int, more: int
) -> None:
    """There a gradient is sent with the whole backward, here before the weights."""
    timeline = simulate_schedule(DUALPIPE_V, p, 2 * p + more, Times(*times))
    idle = timeline.cost - max(timeline.work)
    assert DUALPIPE_V.bubble is not None
    assert idle <= DUALPIPE_V.bubble(p, 2 * p + more, *times) + 1e-9
    if times == (1, 1, 1):
        assert idle == p - 1


@settings(max_examples=25)
@given(p=st.integers(1, 9), more=st.integers(0, 20))
def test_zb_v_has_no_bubble_when_all_parts_take_the_same(p: int, more: int) -> None:
    timeline = simulate_schedule(ZB_V, p, 2 * p - 1 + more, Times(1, 1, 1))
    assert timeline.cost == max(timeline.work)


@grid
def test_microbatches_alive(p: int, m: int) -> None:
    """Exact, in microbatches of a chunk; ``held`` until W."""
    alive = {
        "gpipe": [m] * p,
        "1f1b": [min(p - s, m) for s in range(p)],
        "zb_h1": [min(p - s, m) for s in range(p)],
    }
    for name, expected in alive.items():
        assert check_schedule(SCHEDULES[name], p, m).peak_live == tuple(expected)
    assert check_schedule(ZB_H1, p, m).peak_held == (min(p, m),) * p
    if m % p == 0:
        found = check_schedule(interleaved(3), p, m).peak_live
        # All but the last of m = p: there nothing is left to go forward when backwards begin.
        most = [min(2 * (p - s - 1) + 2 * p + 1, 3 * m) for s in range(p)]
        assert found == tuple(most)
    if m >= 2 * p:
        assert check_schedule(ZB_V, p, m).peak_held == (2 * p,) * p
        assert check_schedule(DUALPIPE_V, p, m).peak_held == (2 * p + 1,) * p
        assert simulate_schedule(ZB_V, p, m).peak_memory(kept=1.0) == (p,) * p


def test_memory_falls_in_two_steps_where_the_backward_is_split() -> None:
    """ZB-H1 holds p M_B on rank 0, and further on M_B until B and the rest until W."""
    timeline = simulate_schedule(ZB_H1, 4, 8)
    assert timeline.peak_memory(kept=0.0) == (4, 3, 2, 1)
    assert timeline.peak_memory(kept=1.0) == (4, 4, 4, 4)
    assert timeline.peak_memory(kept=0.5) == (4, 3.5, 3, 2.5)


def test_the_slowest_stage_sets_the_pace() -> None:
    """1F1B takes (m-1) max + sum where the last stage is the slowest.

    An earlier one does its next forward while the first microbatch is beyond it, and is idle only
    before its first forward and after its last backward: the formula is then an upper bound.
    """
    m = 10
    for slowest in range(4):
        forward, backward = [1.0] * 4, [2.0] * 4
        forward[slowest], backward[slowest] = 4.0, 5.0
        makespan = simulate_schedule(ONE_F_ONE_B, 4, m, Times(forward, backward)).makespan
        assert makespan == m * 9 + slowest * 3
        published = (m - 1) * 9 + sum(forward) + sum(backward)
        assert makespan == published if slowest == 3 else makespan < published


def test_transfers_lengthen_a_lone_microbatch_by_the_way_there_and_back() -> None:
    assert simulate_schedule(GPIPE, 4, 1, Times(transfer=0.5)).makespan == 8 + 2 * 3 * 0.5
    # Between the two chunks of the last rank nothing is sent.
    assert simulate_schedule(ZB_V, 4, 1, Times(1, 1, 0, 0.5)).makespan == 16 + 4 * 3 * 0.5


def test_blocking_transfers_keep_the_sender() -> None:
    times = Times(1, 1, transfer=0.5, blocking=True)
    assert simulate_schedule(GPIPE, 2, 2, times).of(0)[1].start == 1.5
    assert simulate_schedule(GPIPE, 2, 2, replace(times, blocking=False)).of(0)[1].start == 1
    # The last rank sends gradients only, the first hidden states only.
    assert simulate_schedule(GPIPE, 2, 2, times).makespan == 1.5 * 2 + 1 + 1.5 + 1 + 0.5 + 1


def test_a_fused_pair_may_take_less_than_its_parts() -> None:
    both = simulate_schedule(DUALPIPE_V, 4, 16, Times(1, 1, 1))
    less = simulate_schedule(DUALPIPE_V, 4, 16, Times(1, 1, 1, fused=1.5))
    assert both.cost - less.cost > 0.5 * (both.ranks + both.microbatches)


def test_times_of_too_few_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="times of 4 stages were given and there is a stage 4"):
        simulate_schedule(ZB_V, 4, 4, Times(forward=[1.0] * 4))
    with pytest.raises(ConfigError, match="cannot be cut into chunks"):
        Times(forward=[1.0, 2.0]).cut(2)


# --- what is refused ------------------------------------------------------------------------------


def parsed(word: str) -> Action | Fused:
    if "&" in word:
        forward, backward = map(parsed, word.split("&"))
        assert isinstance(forward, Action) and isinstance(backward, Action)
        return Fused(forward, backward)
    microbatch, _, chunk = word[1:].partition(".")
    return Action(word[0], int(microbatch), int(chunk or 0))


def broken(changes: dict[int, str], schedule: Schedule = GPIPE) -> Schedule:
    """A schedule with the actions of some ranks written out."""

    def program(rank: int, ranks: int, microbatches: int) -> Iterator[Action | Fused]:
        if rank not in changes:
            yield from schedule.program(rank, ranks, microbatches)
        yield from map(parsed, changes.get(rank, "").split())

    return replace(schedule, program=program)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: "F0 F1 B0"}, "rank 1, action 3: the schedule ends without B1"),
        ({1: "F0 F1 F0 B0 B1"}, "rank 1, action 2: F0 is done a second time"),
        ({0: "F0 B1 F1 B0"}, "rank 0, action 1: B1 comes before its forward"),
        ({0: "F0 F1 F2 B0 B1"}, "rank 0, action 2: F2 is no F or B of the 2 microbatches"),
        ({0: "F0 F1 W0 B0 B1"}, "rank 0, action 2: W0 is no F or B of the 2 microbatches"),
        ({0: "F0 F1.1 B0 B1"}, r"rank 0, action 1: F1.1 is no F or B of the 2 microbatches"),
        (
            {0: "F0 B0 F1 B1"},
            "rank 0, action 1: B0 waits for ever for B0 of rank 1; ranks 0 -> 1 -> 0 wait for one",
        ),
        (
            {0: "F1 F0 B0 B1", 1: "F0 B0 F1 B1", 2: "F1 B1 F0 B0"},
            "rank 0, action 2: B0 waits for ever for B0 of rank 1; ranks 1 -> 2 -> 1 wait",
        ),
    ],
)
def test_a_broken_schedule_is_refused(changes: dict[int, str], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        check_schedule(broken(changes), 3, 2)
    with pytest.raises(ProgramError, match=message):
        simulate_schedule(broken(changes), 3, 2)


@pytest.mark.parametrize(
    ("schedule", "changes", "message"),
    [
        (ZB_H1, {1: "F0 F1 B0 W0 B1"}, "rank 1, action 5: the schedule ends without W1"),
        (ZB_H1, {1: "F0 F1 W0 B0 B1 W1"}, "rank 1, action 2: W0 comes before its backward"),
        (
            ZB_V,
            {1: "F0 F1 F0.1 F1.1 B0.1 B0 W0 W0.1 B1.1 B1 W1"},
            "rank 1, action 11: the schedule ends without W1.1",
        ),
        (
            ZB_V,
            {1: "F0.1 F0 B0.1 B0 W0 W0.1 F1 F1.1 B1.1 B1 W1 W1.1"},
            "rank 1, action 0: F0.1 waits for ever for its own F0, which comes later",
        ),
        (
            DUALPIPE_V,
            {1: "F0 F0.1 F1&B0.1 W0.1 F1.1&B0.1 W0 B1.1 B1 W1 W1.1"},
            "rank 1, action 4: B0.1 is done a second time",
        ),
        (
            DUALPIPE_V,
            {0: "F0 F0.1&B0.1 W0.1 F1 F1.1 B1.1 B1 W1 W1.1 B0 W0"},
            "rank 0, action 1: B0.1 comes before its forward",
        ),
    ],
)
def test_a_broken_split_schedule_is_refused(
    schedule: Schedule, changes: dict[int, str], message: str
) -> None:
    with pytest.raises(ProgramError, match=message):
        check_schedule(broken(changes, schedule), 2, 2)


@every_schedule
def test_mutants_are_refused_or_still_right(schedule: Schedule) -> None:
    """Every dropped action is found; a swap is found, or the report is still that of a schedule."""
    p, m = 3, 4
    right = [schedule.actions(rank, p, m) for rank in range(p)]

    def with_rank(rank: int, actions: Actions) -> Schedule:
        return replace(schedule, program=lambda r, *_: iter(actions if r == rank else right[r]))

    refused = 0
    for rank, actions in enumerate(right):
        for place in range(len(actions)):
            with pytest.raises(ProgramError, match=rf"rank {rank}, action"):
                check_schedule(with_rank(rank, actions[:place] + actions[place + 1 :]), p, m)
            for other in range(place):
                swapped = list(actions)
                swapped[place], swapped[other] = swapped[other], swapped[place]
                try:
                    simulate_schedule(with_rank(rank, swapped), p, m)
                except ProgramError as error:
                    assert "rank" in str(error) and "action" in str(error)
                    refused += 1
    assert refused > 20


def test_sends_that_block_need_receives_posted_ahead() -> None:
    """Both of two neighbours that send before they receive would wait; one ahead is enough."""
    assert check_schedule(GPIPE, 4, 8).ahead == 0
    assert check_schedule(ONE_F_ONE_B, 4, 8).ahead == 1
    assert check_schedule(ONE_F_ONE_B, 1, 8).ahead == 0


def test_names() -> None:
    assert repr(Action(FORWARD, 3)) == "F3"
    assert repr(Action(BACKWARD, 12, 1)) == "B12.1"
    assert repr(Fused(Action(FORWARD, 3, 1), Action(BACKWARD, 1))) == "F3.1&B1"


def test_an_unknown_schedule_is_told_the_nearest() -> None:
    assert find("1f1b") is ONE_F_ONE_B
    with pytest.raises(ConfigError, match='no schedule "1b1f"; did you mean "1f1b"; known: gpipe'):
        find("1b1f")


def test_facts_in_names() -> None:
    assert find("interleaved:chunks=4").chunks == 4
    assert find("interleaved:chunks=4").name == "interleaved:chunks=4"
    with pytest.raises(ConfigError, match='no fact .* "chunk"; did you mean "chunks"'):
        find("interleaved:chunk=4")
    with pytest.raises(ConfigError, match='"chunks=x" must have the form fact=number'):
        find("interleaved:chunks=x")
    with pytest.raises(ConfigError, match="whole number of chunks from 1 on, not 0"):
        find("interleaved:chunks=0")
    with pytest.raises(ConfigError, match='"gpipe" takes no facts; those that do: interleaved'):
        find("gpipe:chunks=2")
