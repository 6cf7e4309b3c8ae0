"""The harness itself: tests planted to fail on one rank, to hang, to leave, to skip everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import ROOT, Job, run_ranks
from harness.launch import clean_environment
from harness.session import RankSession

BAD = """
import os, sys, time
import pytest
from mpi4py import MPI

comm = MPI.COMM_WORLD

@pytest.mark.ranks(2)
def test_first_passes():
    assert comm.allreduce(1) == 2

@pytest.mark.ranks(2)
def test_one_fails():
    assert comm.rank == 0, "planted failure"

@pytest.mark.ranks(2)
def test_one_raises_before_a_barrier():
    if comm.rank == 1:
        raise ValueError("planted error")
    comm.Barrier()

@pytest.fixture
def broken_on_rank_1():
    if comm.rank == 1:
        raise RuntimeError("planted fixture error")

@pytest.mark.ranks(2)
def test_a_fixture_fails(broken_on_rank_1):
    comm.Barrier()

@pytest.mark.ranks(2, timeout=2)
def test_one_hangs():
    if comm.rank == 1:
        time.sleep(1000)  # planted hang
    comm.Barrier()

@pytest.mark.ranks(2)
def test_one_exits_through_python():
    if comm.rank == 1:
        sys.exit(0)
    comm.Barrier()

@pytest.mark.ranks(2, timeout=20)
def test_one_exits_at_once():
    if comm.rank == 1:
        os._exit(0)
    comm.Barrier()

@pytest.mark.ranks(2)
def test_one_skips():
    if comm.rank == 1:
        pytest.skip("planted skip")

@pytest.mark.ranks(2)
@pytest.mark.xfail(reason="planted xfail")
def test_expected_to_fail():
    assert False

@pytest.mark.ranks(2)
def test_last_passes():
    assert comm.allreduce(1) == 2
"""

SKIPPING = """
import pytest

def test_by_folder(num_ranks):
    from mpi4py import MPI
    assert MPI.COMM_WORLD.size == num_ranks

@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_never_runs(dtype):
    pytest.skip(f"no {dtype} today")

@pytest.mark.ranks(1, 2)
def test_wants_a_gpu():
    pytest.skip("needs a GPU of 80 GB")

@pytest.mark.slow
def test_is_slow():
    pass
"""

LATE = """
import atexit, time
from mpi4py import MPI

def come_late():
    if MPI.COMM_WORLD.rank == 1:
        time.sleep(1000)  # planted

def test_passes():
    atexit.register(come_late)
"""


def plant(folder: Path, source: str) -> Path:
    (folder / "ranks").mkdir()
    (folder / "ranks" / "test_planted.py").write_text(source)
    (folder / "conftest.py").write_text('pytest_plugins = ["harness.plugin"]\n')
    (folder / "pytest.ini").write_text(
        f"[pytest]\naddopts = --import-mode=importlib -rA\npythonpath = {ROOT / 'tests'}\n"
    )
    return folder


def run_pytest(folder: Path, *args: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    # From its own session's point of view this test runs under no outer mpirun.
    run = subprocess.run(
        command, cwd=folder, env=clean_environment({}), capture_output=True, text=True, timeout=120
    )
    return run.returncode, run.stdout + run.stderr


def outcomes(text: str) -> dict[str, str]:
    lines = re.findall(r"^([A-Z]+) \S*::(test_\w+(?:\[\S+\])?)", text, re.M)
    return {name: kind for kind, name in lines}


def test_each_planted_failure_is_reported_and_the_rest_still_runs(tmp_path: Path) -> None:
    start = time.monotonic()
    rc, text = run_pytest(plant(tmp_path, BAD))
    seconds = time.monotonic() - start
    assert rc == 1, text
    failing = {
        "test_one_fails": "planted failure",
        "test_one_raises_before_a_barrier": "planted error",
        "test_a_fixture_fails": "planted fixture error",
        "test_one_hangs": "in test_one_hangs",
        "test_one_exits_through_python": "SystemExit",
        "test_one_exits_at_once": "left no report",
        "test_one_skips": "skipped on ranks [1] of 2 only",
    }
    assert outcomes(text) == {
        **{f"{name}[ranks2]": "FAILED" for name in failing},
        "test_first_passes[ranks2]": "PASSED",
        "test_expected_to_fail[ranks2]": "XFAIL",
        "test_last_passes[ranks2]": "PASSED",
    }, text
    for name, words in failing.items():
        report = re.search(rf"^_+ {name}\[ranks2\] _+$(.*?)(?=^_+ test_|^=+ )", text, re.M | re.S)
        assert report is not None and words in report[1], text
    assert seconds < 60, f"{seconds:.0f} s\n{text}"


@pytest.mark.slow
def test_skipped_at_every_size_is_an_error(tmp_path: Path) -> None:
    rc, text = run_pytest(plant(tmp_path, SKIPPING))
    assert rc == 1, text
    lines = [line for line in text.splitlines() if line.startswith("ERROR")]
    assert lines == [
        f"ERROR ranks/test_planted.py::test_never_runs[{dtype}] was skipped at every number of "
        f"ranks: no {dtype} today"
        for dtype in ("f32", "bf16")
    ], text
    passed = {name for name, kind in outcomes(text).items() if kind == "PASSED"}
    assert passed == {f"test_by_folder[ranks{n}]" for n in (1, 2, 3, 4)}, text
    assert "4 deselected" in text


@pytest.mark.slow
def test_only_one_size_of_a_skipping_test_is_no_error(tmp_path: Path) -> None:
    rc, text = run_pytest(plant(tmp_path, SKIPPING), "-k", "ranks2 or ranks3", "--all")
    assert rc == 0, text


@pytest.mark.slow
def test_ranks_that_do_not_end_say_where_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.session._END_LIMIT_S", 3.0)
    test = "ranks/test_planted.py::test_passes[ranks2]"
    session = RankSession(2, {test: 60.0}, ["-p", "no:cacheprovider"], plant(tmp_path, LATE))
    assert session.outcome(test) == ("passed", "")
    (said,) = session.finish()
    session.close()
    assert "the 2 ranks did not end well: rc 124 after " in said, said
    assert "in come_late" in said and "--- rank 1 ---" in said, said


@pytest.mark.slow
def test_by_hand(tmp_path: Path) -> None:
    folder = plant(tmp_path, BAD)
    by_hand = ["-m", "pytest", "--with-mpi", "--color=no", "ranks"]
    run = run_ranks(2, [*by_hand, "-k", "first or one_fails or last"], cwd=folder)
    assert run.rc == 1 and run.left_behind == 0, run.text
    assert "planted failure" in run.stdout and "rank 1" in run.stdout, run.text
    assert run.stdout.count("test session starts") == 1, run.text
    assert outcomes(run.stdout)["test_last_passes[ranks2]"] == "PASSED"

    run = run_ranks(2, [*by_hand, "-k", "before_a_barrier"], cwd=folder)
    assert run.rc != 0 and run.seconds < 30, run.text
    assert "planted error" in run.stderr and "waited" in run.stderr, run.text

    run = run_ranks(3, by_hand, cwd=folder)
    assert run.rc == 0 and "for (2,) ranks, not 3" in run.stdout, run.text


def test_a_job_is_stopped_at_its_limit_and_nothing_is_left() -> None:
    program = "from mpi4py import MPI; import time; print('up', flush=True); time.sleep(1000)"
    run = run_ranks(2, ["-c", program], timeout=2)
    assert run.timed_out and run.rc == 124 and run.left_behind == 0, run.text
    assert run.seconds < 20 and run.stdout.count("up") == 2, run.text

    with Job(2, ["-c", program]) as job:
        job.wait_for("up")
        assert sorted(job.rank_pids()) == [0, 1]
    assert job.pids() == []
