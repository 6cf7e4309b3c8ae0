"""The bench of training: both sides learn the same, in every mode, and rows say so."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from shlex import split

import pytest

from harness import ROOT, run_ranks
from mpmp import commands
from mpmp.errors import ConfigError, LayoutError
from mpmp.job.bench.train.rows import Row, gap, shown
from mpmp.job.bench.train.settings import MODES, TrainSteps
from system.small import HOME

BENCH = ["-m", "mpmp.bench", "train"]
TINY = split(
    "--layers 2 --width 32 --heads 2 --context 16 --vocabulary 64 --batch 2 --microbatches 3 "
    "--steps 2 --repeats 2"
)
ENV = {"PYTHONPATH": str(ROOT), **HOME}


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["mode"]: row for row in csv.DictReader(file)}


@pytest.mark.mpich_too
@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 1e-5), pytest.param("bfloat16", 2e-2, marks=pytest.mark.slow)]
)
def test_both_sides_learn_the_same_in_every_mode(tmp_path: Path, dtype: str, limit: float) -> None:
    path = tmp_path / "rows.csv"
    done = run_ranks(2, [*BENCH, *TINY, "--dtype", dtype, "--csv", str(path)], env=ENV, timeout=240)
    assert done.rc == 0 and done.left_behind == 0, done.text
    rows = read_rows(path)
    assert list(rows) == ["one", "data", "data/ideal", "zero3", "tensor", "tensor/one", "pipeline"]
    for mode, row in rows.items():
        assert list(row) == list(Row.__annotations__)
        ours, theirs = float(row["ours_tokens_per_s"]), float(row["theirs_tokens_per_s"])
        assert ours > 0 and theirs > 0 and float(row["ratio"]) > 0
        if mode != "data/ideal":
            assert 0 <= float(row["loss_gap"]) <= limit, row
    for said in ("pipeline turn 2/2", "warm-up", "DDP", "FSDP2", "tokens/s, loss"):
        assert said in done.stdout, said


def test_one_rank_alone_measures_mode_one_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    done = run_ranks(1, [*BENCH, *TINY, "--modes", "one", "--csv", str(path)], env=ENV, timeout=120)
    assert done.rc == 0 and list(read_rows(path)) == ["one"], done.text


@pytest.mark.parametrize(
    ("ranks", "arguments", "code", "sentence"),
    [
        (1, [], 3, "needs at least 2 ranks but 1 was started"),
        (2, ["--modes", "tensor", "--heads", "3", "--width", "33"], 3, "--heads 3 evenly"),
        (2, ["--modes", "pipelin"], 2, 'did you mean "pipeline"'),
        (2, ["--csv", "no/rows.csv"], 74, "is no folder to write to"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    ranks: int, arguments: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    done = run_ranks(ranks, [*BENCH, *TINY, *arguments], env=ENV, cwd=tmp_path, timeout=120)
    ours = [line for line in done.stderr.splitlines() if re.match(r"\[rank ./. ", line)]
    assert done.rc == code and len(ours) == 1 and sentence in ours[0], done.text
    assert "warm-up" not in done.stdout


def test_another_training_ends_with_1(tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(
        "from mpmp import bench\n"
        "from mpmp.job.bench.train import theirs\n"
        "right = theirs._own_rows\n"
        "theirs._own_rows = lambda *given: (0, right(*given)[1] - 1)\n"
        "bench.main()\n"
    )
    done = run_ranks(2, [script, "train", *TINY, "--modes", "one"], env=ENV, timeout=120)
    assert done.rc == 1 and "they are not the same training" in done.stderr, done.text


# --- in one process -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--modes", ","], "names with commas"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--width", "100"], "--width 100 must be a multiple of --heads 6"),
        (["--learning_rate", "0"], "--learning_rate must lie in (0, 1)"),
        (["--dtype", "float16"], "invalid choice 'float16'"),
    ],
)
def test_bad_settings_are_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        commands.cli(TrainSteps, "bench", "", arguments, TrainSteps())


def test_ranks_must_cut_evenly() -> None:
    TrainSteps(modes="one").require_ranks(1)
    TrainSteps(vocabulary=4098).require_ranks(3)
    for ranks, settings in ((4, TrainSteps()), (2, TrainSteps(layers=3)), (1, TrainSteps())):
        with pytest.raises(LayoutError):
            settings.require_ranks(ranks)


def test_a_row_is_the_median_of_turns_and_of_pairs() -> None:
    row = Row.of("data", [10.0, 30.0, 20.0], [10.0, 10.0, 25.0], 1e-3)
    assert row == Row("data", 20.0, 10.0, 1.0, 1e-3)
    assert gap([1.0, 2.0], [1.5, 2.1]) == 0.5
    assert math.isnan(gap([1.0, float("nan")], [9.0, 2.0]))
    lines = shown([row, Row("one", 1.0, 1.0, 1.0, float("nan"))], dict(MODES)).splitlines()
    assert lines[2].split() == ["data", "20", "DDP", "10", "1.00", "1.0e-03"]
    assert lines[3].split() == ["one", "1", "plain", "torch", "1", "1.00"]
