"""Searched schedules: never worse than what Zero Bubble printed, within memory, always the same."""

from __future__ import annotations

import csv
import sys
import time
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmp.errors import ConfigError
from mpmp.programs.check_schedules import check_schedule
from mpmp.programs.schedules import SCHEDULES, find
from mpmp.programs.schedules.interleaved import interleaved
from mpmp.programs.schedules.search import search
from mpmp.programs.steps import Schedule
from mpmp.programs.timeline import Times, simulate_schedule

# Qi et al. 2023, "Zero Bubble Pipeline Parallelism", arXiv:2401.10241, tables 3, 4, 5, 9: times in
# ms, bubble rates of hand-made schedules, and of their search with p and with 2p M_B of memory.
# ``kept`` is M_W / M_B there: 32 h / (34 h + 5 a s), s = 1024. ``chunks`` are those of 1F1B-I.
PRINTED = """\
p,m,TF,TB,TW,Tcomm,kept,chunks,1f1b,interleaved,zb_h1,zb_1p,zb_2p
8,24,18.522,18.086,9.337,0.601,0.3664,3,0.2431,0.1055,0.1585,0.1585,0.0433
8,32,18.513,18.086,9.331,0.626,0.3664,3,0.1985,0.0818,0.1242,0.1242,0.0039
8,64,18.546,18.097,9.321,0.762,0.3664,3,0.1240,0.0443,0.0674,0.0674,0.0026
8,24,29.718,29.444,19.927,0.527,0.4321,4,0.2347,0.0808,0.1323,0.1323,0.0029
8,32,29.802,29.428,19.530,0.577,0.4321,4,0.1898,0.0628,0.1045,0.1045,0.0022
8,64,29.935,29.621,19.388,0.535,0.4321,4,0.1091,0.0320,0.0554,0.0554,0.0010
16,48,11.347,11.248,8.132,0.377,0.4325,3,0.2552,0.1104,0.1397,0.1397,0.0066
16,64,11.307,11.254,8.101,0.379,0.4325,3,0.2082,0.0852,0.1088,0.1088,0.0054
16,128,11.325,11.308,8.109,0.378,0.4325,3,0.1251,0.0445,0.0576,0.0576,0.0028
"""
ROWS = [
    {name: float(value) for name, value in row.items()} for row in csv.DictReader(StringIO(PRINTED))
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['TF']}-{row['m']:.0f}")
Row = dict[str, float]


def shape_and_times(row: Row) -> tuple[int, int, Times]:
    return int(row["p"]), int(row["m"]), Times(row["TF"], row["TB"], row["TW"], row["Tcomm"])


@every_row
def test_bubble_rates_are_the_printed_ones(row: Row) -> None:
    p, m, times = shape_and_times(row)
    for name in ("1f1b", "zb_h1"):
        rate = simulate_schedule(SCHEDULES[name], p, m, times).bubble_rate
        assert round(rate, 4) == row[name], name


@every_row
def test_interleaved_equals_the_closed_form(row: Row) -> None:
    """The span of rank 0 is m S + (p-1) S / v + 2(pv-1) Tc.

    The paper prints p Tc less. Its script (efficiency.py of the paper's repository, at commit
    f68d387) lets only the first microbatch of a group wait for its way from the last rank back to
    the first; the others would have to arrive before they are sent.
    """
    p, m, times = shape_and_times(row)
    v, S = int(row["chunks"]), row["TF"] + row["TB"] + row["TW"]
    timeline = simulate_schedule(interleaved(v), p, m, times.cut(v))
    closed = m * S + (p - 1) * S / v + 2 * (p * v - 1) * row["Tcomm"]
    assert timeline.cost == pytest.approx(closed, rel=1e-12)
    printed = closed - p * row["Tcomm"]
    assert round(1 - m * S / printed, 4) == row["interleaved"]


def found(row: Row, memory: float) -> Schedule:
    return search(row["TF"], row["TB"], row["TW"], row["Tcomm"], memory, row["kept"])


@pytest.mark.parametrize(
    "row", (*ROWS[:2], ROWS[3], ROWS[6]), ids=lambda row: f"{row['TF']}-{row['m']:.0f}"
)
@pytest.mark.parametrize(("times_p", "printed"), [(1, "zb_1p"), (2, "zb_2p")])
def test_a_searched_schedule_is_no_worse_than_the_printed(
    row: Row, times_p: int, printed: str
) -> None:
    p, m, times = shape_and_times(row)
    began = time.process_time()
    schedule = found(row, times_p * p)
    timeline = simulate_schedule(schedule, p, m, times)
    if p == 8:
        assert time.process_time() - began < 20, "a second or two, on a machine that is busy"
    assert round(timeline.bubble_rate, 4) <= row[printed]
    assert max(timeline.peak_memory(row["kept"])) <= times_p * p + 1e-6


@settings(max_examples=12)
@given(data=st.data())
def test_searched_schedules_work_within_their_memory(data: st.DataObject) -> None:
    p, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    chunks = data.draw(st.integers(1, 2))
    seconds = st.floats(0.1, 3)
    per_stage = st.lists(seconds, min_size=p * chunks, max_size=p * chunks)
    forward, backward, weight = (data.draw(seconds | per_stage) for _ in range(3))
    transfer, kept = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    memory = data.draw(st.lists(st.floats(1, 8), min_size=p, max_size=p))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["mpmp.programs.schedules.search"], "TRIES", 0)
        schedule = search(forward, backward, weight, transfer, memory, kept, chunks)
        check_schedule(schedule, p, m)
        timeline = simulate_schedule(schedule, p, m, Times(forward, backward, weight, transfer))
    peaks = timeline.peak_memory(kept)
    assert all(peak <= limit + 1e-6 for peak, limit in zip(peaks, memory, strict=True))


def test_more_memory_buys_a_smaller_bubble() -> None:
    rates = []
    for memory in (2, 4, 6, 8):
        schedule = search(1, 1.2, 0.8, 0.05, memory)
        timeline = simulate_schedule(schedule, 4, 12, Times(1, 1.2, 0.8, 0.05))
        assert max(timeline.peak_memory(kept=1.0)) <= memory + 1e-6
        rates.append(timeline.bubble_rate)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 < 0.2 < rates[0]


def test_two_chunks_need_no_more_memory_for_no_bubble() -> None:
    for memory, most in ((4, 0.0), (3, 0.1), (2, 0.3)):
        timeline = simulate_schedule(search(memory=memory, chunks=2), 4, 12, Times(1, 1, 1))
        assert timeline.bubble_rate <= most
        assert max(timeline.peak_memory(kept=1.0)) <= memory


def test_search_by_name() -> None:
    schedule = find("search:forward=1/2,backward=1,weight=0.5,transfer=0.1,memory=3")
    check_schedule(schedule, 2, 6)
    same = search((1.0, 2.0), 1, 0.5, 0.1, 3)
    assert [schedule.actions(r, 2, 6) for r in (0, 1)] == [same.actions(r, 2, 6) for r in (0, 1)]
    with pytest.raises(ConfigError, match="2 stages were given and there is a stage 2"):
        schedule.actions(0, 3, 6)
    with pytest.raises(ConfigError, match='no fact .* "forwards"; did you mean "forward"'):
        find("search:forwards=1")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"memory": 0.5}, "memory must be 1 .a microbatch. or more on each of the 4 ranks, not"),
        ({"memory": (4, 4)}, "on each of the 4 ranks, not 4/4; raise it and cut the batch"),
        ({"kept": 1.5}, "kept is the share of memory that waits for W, 0 to 1, not 1.5"),
        ({"chunks": 3}, "search takes 1 chunk a rank, or 2 for a V, not 3"),
        ({"forward": 0.0}, "seconds must be positive"),
        ({"transfer": -1.0}, "seconds must be positive"),
    ],
)
def test_impossible_searches_are_refused(facts: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(**facts).actions(0, 4, 8)
