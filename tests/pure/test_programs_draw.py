"""Pictures of collectives as text, and PNG files that hold something."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from mpmp.programs.collectives import find
from mpmp.programs.draw import draw_collective, draw_collective_png, draw_png
from mpmp.programs.schedules import SCHEDULES
from mpmp.programs.steps import Algorithm, Cost, Receive, Reduce, Round, Schedule, Send
from mpmp.programs.timeline import Times, simulate_schedule
from pure.oracle import ALGORITHMS


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


def test_table_of_messages_in_several_pieces() -> None:
    """Chunks of a circle and of Bruck's slots are one message; 5-9 are the output."""
    assert draw_collective(find("alltoall", "bruck"), 5).splitlines()[1:3] == [
        "0      1 3 => 1  2 4 => 2  3 0 => 3  4 1 => 4  0 2 => 0",
        "1      2 7 => 2  3 8 => 3  4 9 => 4  0 5 => 0  1 6 => 1",
    ]
    assert draw_collective(find("gather", "binomial"), 6, root=4) == (
        """\
round  rank 0    rank 1  rank 2    rank 3  rank 4  rank 5
0                1 => 0            3 => 2          5 => 4
1      0-1 => 4
2                        2-3 => 4"""
    )


def test_table_of_a_double_tree() -> None:
    assert draw_collective(find("allreduce", "double_binary_tree"), 4) == (
        """\
round  rank 0  rank 1          rank 2          rank 3
0      1 +> 1  0 +> 2          1 +> 1          0 +> 2
1              1 +> 3          0 +> 0
2      0 => 2                                  1 => 1
3              1 => 0, 1 => 2  0 => 1, 0 => 3"""
    )


def test_pieces_that_are_combined_and_copied_in_one_message() -> None:
    def mixed(rank: int, size: int) -> Iterator[Round]:
        yield Round(Send(0, 1), Send(1, 1)) if rank == 0 else Round(Reduce(0, 0), Receive(1, 0))

    algorithm = Algorithm(mixed, lambda size: 2, lambda size: Cost(1, Fraction(1)))
    assert draw_collective(algorithm, 2).splitlines()[1] == "0      0 +> 1, 1 => 1"


def assert_is_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_picture_of_a_schedule(schedule: Schedule, tmp_path: Path) -> None:
    draw_png(simulate_schedule(schedule, 4, 8, Times(1, 1, 1)), tmp_path / "schedule.png")
    assert_is_picture(tmp_path / "schedule.png")


@pytest.mark.parametrize(("collective", "name"), ALGORITHMS)
def test_picture_of_a_collective(collective: str, name: str, tmp_path: Path) -> None:
    draw_collective_png(find(collective, name), 5, tmp_path / "collective.png")
    assert_is_picture(tmp_path / "collective.png")


def test_the_pictures_in_the_docs_are_those_of_the_schedules() -> None:
    docs = Path(__file__).parents[2] / "docs"
    drawn = runpy.run_path(str(docs / "pictures.py"))["with_pictures"]
    page = (docs / "schedules.md").read_text()
    assert page.count("<!-- picture:") == 6
    assert drawn(page) == page
