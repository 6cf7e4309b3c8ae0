"""The bench measures every algorithm beside the library's own, and says where sums are wrong."""

from __future__ import annotations

import csv

import pytest

from harness import ROOT, run_ranks
from mpmp.programs.collectives import COLLECTIVES


@pytest.mark.mpich_too
def test_bench_prints_and_writes_every_algorithm(tmp_path):
    path = tmp_path / "rows.csv"
    args = ["-m", "mpmp.bench", "--smallest", "64", "--largest", "70000", "--repeats", "2"]
    done = run_ranks(3, [*args, "--csv", str(path)], env={"PYTHONPATH": str(ROOT)})
    assert done.rc == 0, done.text
    with path.open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["collective"], row["algorithm"], int(row["bytes"])) for row in rows}
    assert found == {
        (collective, name, nbytes)
        for collective, algorithms in COLLECTIVES.items()
        for name in ("native", "auto", *algorithms)
        for nbytes in (64, 1024, 16384)
    }
    for row in rows:
        assert row["wrong"] == "0" and float(row["time_us"]) > 0, row
        factor = {"allreduce": 4 / 3, "broadcast": 1}.get(row["collective"], 2 / 3)
        assert float(row["busbw_GBps"]) == pytest.approx(factor * float(row["algbw_GBps"]))
    assert done.stdout.count("x native") == len(rows)


def test_bad_arguments_end_with_one_line():
    done = run_ranks(2, ["-m", "mpmp.bench", "--repeats", "0"], env={"PYTHONPATH": str(ROOT)})
    assert done.rc == 2 and done.stderr.startswith("[rank 0/2 "), done.text
    assert "at least one repeat" in done.stderr.splitlines()[0]
