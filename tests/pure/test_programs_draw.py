"""Pictures of collectives as text, and PNG files that hold something."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpmp.programs.collectives import COLLECTIVES, find
from mpmp.programs.draw import draw_collective, draw_collective_png, draw_png
from mpmp.programs.schedules import SCHEDULES
from mpmp.programs.simulate import Times, simulate_schedule
from mpmp.programs.steps import Schedule


def test_table_of_a_ring() -> None:
    assert draw_collective(find("allreduce", "ring"), 3) == (
        """\
round  rank 0  rank 1  rank 2
0      0 +> 1  1 +> 2  2 +> 0
1      2 +> 1  0 +> 2  1 +> 0
2      1 => 1  2 => 2  0 => 0
3      0 => 1  1 => 2  2 => 0"""
    )


def test_table_of_a_folded_halving() -> None:
    assert draw_collective(find("reduce_scatter", "recursive_halving"), 5) == (
        """\
round  rank 0    rank 1    rank 2    rank 3    rank 4
0                0-4 +> 0
1      3-4 +> 3            3-4 +> 4  0-2 +> 0  0-2 +> 2
2      2 +> 2              0-1 +> 0  4 +> 4    3 +> 3
3      1 => 1"""
    )


def test_table_of_a_broadcast_from_another_root() -> None:
    assert draw_collective(find("broadcast", "binomial"), 4, root=1) == (
        """\
round  rank 0  rank 1  rank 2  rank 3
0              0 => 3
1              0 => 2          0 => 0"""
    )


def assert_is_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_picture_of_a_schedule(schedule: Schedule, tmp_path: Path) -> None:
    draw_png(simulate_schedule(schedule, 4, 8, Times(1, 2)), tmp_path / "schedule.png")
    assert_is_picture(tmp_path / "schedule.png")


@pytest.mark.parametrize(
    ("collective", "name"), [(one, name) for one, table in COLLECTIVES.items() for name in table]
)
def test_picture_of_a_collective(collective: str, name: str, tmp_path: Path) -> None:
    draw_collective_png(find(collective, name), 5, tmp_path / "collective.png")
    assert_is_picture(tmp_path / "collective.png")
