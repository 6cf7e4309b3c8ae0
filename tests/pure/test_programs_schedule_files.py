"""Schedules in CSV files: what is written is read, and what could not work is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mpmp.errors import ConfigError, InputOutputError, MpmpError, ProgramError
from mpmp.programs.schedules import SCHEDULES, find
from mpmp.programs.schedules.files import read, write
from mpmp.programs.steps import Schedule

HEAD = "# mpmp schedule: ranks=2 microbatches=2 chunks=1 folded=no splits=no\n"
COLUMNS = "rank,slot,kind,microbatch,chunk\n"
GPIPE = (
    HEAD
    + COLUMNS
    + "".join(
        f"{rank},{slot},{kind},{number},0\n"
        for rank in (0, 1)
        for slot, (kind, number) in enumerate((("F", 0), ("F", 1), ("B", 0), ("B", 1)))
    )
)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 5), (3, 4), (4, 3)])
def test_what_is_written_is_read(schedule: Schedule, p: int, m: int, tmp_path: Path) -> None:
    path = tmp_path / "made.csv"
    write(schedule, p, m, path)
    found = find(str(path))
    assert (found.chunks, found.folded, found.splits) == (
        schedule.chunks,
        schedule.folded,
        schedule.splits,
    )
    for rank in range(p):
        assert found.actions(rank, p, m) == schedule.actions(rank, p, m)


def test_a_file_is_one_to_read(tmp_path: Path) -> None:
    write(SCHEDULES["gpipe"], 2, 2, tmp_path / "gpipe.csv")
    assert (tmp_path / "gpipe.csv").read_text() == GPIPE
    write(SCHEDULES["dualpipe_v"], 2, 4, tmp_path / "dualpipe_v.csv")
    lines = (tmp_path / "dualpipe_v.csv").read_text().splitlines()
    assert lines[0].endswith("ranks=2 microbatches=4 chunks=2 folded=yes splits=yes")
    # A fused pair: two lines of one slot.
    assert "0,7,F,3,0" in lines and "0,7,B,1,1" in lines


def test_order_of_lines_and_size_of_slots_are_free(tmp_path: Path) -> None:
    head, columns, *rows = GPIPE.splitlines(keepends=True)
    spread = [row.replace(",3,B", ",30,B") for row in reversed(rows)]
    path = tmp_path / "spread.csv"
    path.write_text(head + columns + "\n" + "".join(spread))
    assert read(path).actions(1, 2, 2) == SCHEDULES["gpipe"].actions(1, 2, 2)


def test_a_file_is_for_its_ranks_and_microbatches(tmp_path: Path) -> None:
    path = tmp_path / "gpipe.csv"
    path.write_text(GPIPE)
    with pytest.raises(
        ConfigError, match="for 2 ranks and 2 microbatches, not for 2 and 3; set .*microbatches 2"
    ):
        find(str(path)).actions(0, 2, 3)


def changed(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


BROKEN: list[tuple[Callable[[str], str], type[MpmpError], str]] = [
    (lambda text: "", ConfigError, "line 1: must have the form # mpmp schedule: ranks=4"),
    (changed("ranks=2", "ranks=0"), ConfigError, "line 1: must have the form"),
    (changed("ranks=2", "ranks=2 hosts=1"), ConfigError, "line 1: must have the form"),
    (changed("folded=no", "folded=maybe"), ConfigError, "line 1: must have the form"),
    (changed("rank,slot", "slot,rank"), ConfigError, "line 2: must be rank,slot,kind,micro"),
    (changed("0,0,F,0,0", "0,0,G,0,0"), ConfigError, "line 3: must be .* it is '0,0,G,0,0'"),
    (changed("0,0,F,0,0", "0,0,F,0"), ConfigError, "line 3: must be .* it is '0,0,F,0'"),
    (changed("0,0,F,0,0", "0,0,F,-1,0"), ConfigError, "line 3: must be"),
    (changed("0,0,F,0,0", "2,0,F,0,0"), ConfigError, "line 3: rank 2 is not one of the 2"),
    (changed("0,1,F", "0,0,F"), ConfigError, r"line 4: slot 0 of rank 0 holds \[F0, F1\] and"),
    (changed("0,1,F,1,0\n", ""), ProgramError, "rank 0, action 2: B1 comes before its forw"),
    (
        changed("0,3,B,1,0\n", ""),
        ProgramError,
        "rank 0, action 3: the schedule ends without B1",
    ),
    (changed("0,1,F", "0,9,F"), ProgramError, "rank 0, action 2: B1 comes before"),
    (changed("0,2,B,0", "0,0,B,0"), ProgramError, "rank 0, action 0: B0 comes before its for"),
    (
        changed("splits=no", "splits=yes"),
        ProgramError,
        "action 4: the schedule ends without W0",
    ),
    (changed("chunks=1", "chunks=2"), ProgramError, "action 4: the schedule ends without B0.1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_file_that_cannot_work_is_refused_with_the_reason(
    change: Callable[[str], str], error: type[MpmpError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "broken.csv"
    path.write_text(change(GPIPE))
    with pytest.raises(error, match=message) as raised:
        find(str(path))
    assert "broken.csv" in str(raised.value)


def test_a_cyclic_wait_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cyclic.csv"
    path.write_text(GPIPE.replace("0,1,F,1", "0,2,F,1").replace("0,2,B,0", "0,1,B,0", 1))
    write(SCHEDULES["gpipe"], 2, 2, tmp_path / "fine.csv")
    with pytest.raises(ProgramError, match="rank 0, action 1: B0 waits for ever .*0 -> 1 -> 0"):
        find(str(path))


def test_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputOutputError, match="cannot read the schedule .*none.csv: No such file"):
        find(str(tmp_path / "none.csv"))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="bytes.csv is no schedule: it is not text"):
        find(str(tmp_path / "bytes.csv"))
    with pytest.raises(InputOutputError, match="cannot write the schedule .*: No such file"):
        write(SCHEDULES["gpipe"], 2, 2, tmp_path / "none" / "gpipe.csv")
