"""The command of a dry run: any world in one process, without MPI."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import ROOT
from system.small import HOME, alone, ended


def dry(args: str, folder: Path, timeout: float = 120) -> list[str]:
    run = alone(["-m", "mpmp.train", "--dry-run", *args.split()], folder, HOME, timeout)
    assert run.rc == 0 and run.stderr == "", run.text
    return run.stdout.splitlines()


def test_a_world_that_is_not_there_is_shown(tmp_path: Path) -> None:
    small = "--model.layers 4 --model.width 32 --model.context 16"
    lines = dry(f"--ranks 48 --layout pp2.tp3.zero1 {small} --train.batch 32", tmp_path)
    head = next(line for line in lines if line.startswith("dry run of"))
    assert "dp8.pp2.tp3.zero1 on 48 ranks" in head
    rows = [line.split() for line in lines if line.split() and line.split()[0][0].isdigit()]
    ranks = [one for row in rows for one in row[0].split(",")]
    assert sum(int(b or a) - int(a) + 1 for a, _, b in (one.partition("-") for one in ranks)) == 48
    assert lines[-1].startswith("most memory: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ("--dry-run --ranks 6 --layout tp4", 3, "legal layouts for 6"),
        ("--dry-run --ranks many", 2, "--ranks needs a number"),
        ("--ranks 4", 2, "goes with --dry-run"),
        ("--dry-run --layout tp8", 3, "tensor ranks (8)"),
        ("--dry-run --layout pp2 --parallel.cut measured", 2, "take no time"),
    ],
)
def test_what_cannot_be_is_refused(args: str, code: int, words: str, tmp_path: Path) -> None:
    ended(alone(["-m", "mpmp.train", *args.split()], tmp_path, HOME), code, words)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_billion_parameters_in_a_hundred_parts(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "gpt-1b.toml"
    lines = dry(f"--recipe {recipe}", tmp_path, timeout=800)
    assert any("dp1.pp25.tp4.sp on 100 ranks" in line for line in lines)
