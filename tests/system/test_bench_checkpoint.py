"""The bench of checkpoints: what it measures, and that ranks together read each byte once."""

import csv
from pathlib import Path
from shlex import split

import pytest

from harness import ROOT, run_ranks
from mpmp import commands
from mpmp.errors import ConfigError
from mpmp.job.bench.checkpoint.settings import Checkpoints
from system.small import HOME

BENCH = ["-m", "mpmp.bench", "checkpoint"]
ENV = {"PYTHONPATH": str(ROOT), **HOME}


def test_rows_of_two_ranks_and_nothing_is_left(tmp_path: Path) -> None:
    path, folder = tmp_path / "rows.csv", tmp_path / "disk"
    args = split(f"--megabytes 20 --repeats 2 --folder {folder} --csv {path}")
    done = run_ranks(2, [*BENCH, *args], env=ENV, timeout=120)
    assert done.rc == 0 and done.left_behind == 0, done.text
    with path.open() as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["write", "early", "save", "behind", "blocked", "load"]
    assert all(0 < float(row["least_s"]) <= float(row["median_s"]) for row in rows.values())
    assert max(float(rows[kind]["ratio"]) for kind in ("write", "early")) == 1.0
    assert 1.0 <= float(rows["load"]["ratio"]) <= 1.1
    assert [one.name for one in folder.iterdir()] == [".lock"]
    assert "of the disk's speed" in done.stdout


@pytest.mark.parametrize("argument", ["--megabytes=0", "--repeats=-1"])
def test_what_cannot_be_measured_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"must be at least 1"):
        commands.cli(Checkpoints, "mpmp.bench checkpoint", "", [argument], Checkpoints())
