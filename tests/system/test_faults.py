"""However one rank ends, the job ends at once: one message, one code, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Job, Run, run_ranks
from system.small import HOME, PLANTED, SMALL, alone, ended, events, mpmp_names, plant_text

TRAIN = ["-m", "mpmp.train", *SMALL, "--checkpoint.dir", "run"]
GONE_S = 5.0
"""Within which the whole job must be gone."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a text; afterwards mpmp must have left nothing in /dev/shm."""
    plant_text(tmp_path)
    before = mpmp_names()
    yield tmp_path
    assert mpmp_names() <= before


@pytest.fixture
def temporary() -> Iterator[str]:
    """A folder for temporary files (a short path: Open MPI makes sockets in it)."""
    path = tempfile.mkdtemp(dir="/tmp", prefix="t")
    yield path
    assert not mpmp_names(path)
    shutil.rmtree(path)


def wait_for_step(job: Job, folder: Path, step: int) -> float:
    """When the metrics file said that a step had been taken."""
    path, limit_s = folder / "run" / "metrics.jsonl", time.monotonic() + 60
    while f'"step": {step},' not in (path.read_text() if path.exists() else ""):
        assert job.process.poll() is None and time.monotonic() < limit_s, job.stdout + job.stderr
        time.sleep(0.01)
    return time.monotonic()


def gone_at_once(job: Job, since_s: float) -> Run:
    """The job's end, which must come within seconds and be everybody's."""
    run = job.finish(60)
    took_s = time.monotonic() - since_s
    assert took_s < GONE_S, f"gone {took_s:.1f} s after the fault\n{run.text}"
    return run


# --- must show 6: MPMP_FAULT ----------------------------------------------------------------------


@pytest.mark.mpich_too
@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("raise", 1, "RuntimeError: MPMP_FAULT raised on rank 1 at step 5"),
        ("exit", 76, "sys.exit(0)"),
        ("kill", None, "MPMP_FAULT kills rank 1 at step 5"),
    ],
)
def test_a_job_of_4_is_gone_when_one_rank_is(
    kind: str, code: int | None, words: str, folder: Path, temporary: str
) -> None:
    env = {**HOME, "MPMP_FAULT": f"{kind}:rank=1:step=5", "TMPDIR": temporary}
    args = [*TRAIN, "--parallel.pipeline", "2", "--train.steps", "100000"]
    with Job(4, args, env=env, cwd=folder) as job:
        run = gone_at_once(job, wait_for_step(job, folder, 5))
    assert run.rc != 0, run.text
    line = ended(run, run.rc if code is None else code, words)
    assert line.startswith("[rank 1/4 "), run.text


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("dp2", marks=pytest.mark.slow),
        pytest.param("tp2", marks=pytest.mark.slow),
        pytest.param("pp2", marks=pytest.mark.mpich_too),
    ],
)
def test_a_rank_that_hangs_is_named(layout: str, folder: Path) -> None:
    run = run_ranks(
        2,
        [*TRAIN, "--train.steps", "9", "--comm.timeout_s", "3", "--layout", layout],
        env={**HOME, "MPMP_FAULT": "hang:rank=1:step=2"},
        cwd=folder,
    )
    line = ended(run, 76, "waited 3 s for", "rank 1", "--comm.timeout_s")
    assert line.startswith("[rank 0/2 "), run.text


@pytest.mark.slow
def test_a_rank_that_is_late_is_waited_for(folder: Path) -> None:
    run = run_ranks(
        2,
        [*TRAIN, "--train.steps", "4", "--comm.timeout_s", "30", "--layout", "tp2"],
        env={**HOME, "MPMP_FAULT": "sleep:rank=1:step=2:seconds=4"},
        cwd=folder,
    )
    assert run.rc == 0 and run.stderr == "" and run.left_behind == 0, run.text
    waits = [one["communication"] for one in events(folder / "run", "step")]
    assert waits[2] > 0.8, f"share of communication in each step: {waits}"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_rank_that_is_20_s_late_is_waited_for(folder: Path) -> None:
    run = run_ranks(
        4,
        [*TRAIN, "--train.steps", "4", "--layout", "dp2.pp2"],
        env={**HOME, "MPMP_FAULT": "sleep:rank=1:step=2:seconds=20"},
        cwd=folder,
    )
    assert run.rc == 0 and run.stderr == "", run.text


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_fault_that_is_not_understood(n: int, folder: Path) -> None:
    env = {**HOME, "MPMP_FAULT": "explode:rank=1:step=5"}
    run = alone(TRAIN, folder, env) if n == 1 else run_ranks(n, TRAIN, env=env, cwd=folder)
    ended(run, 2, "MPMP_FAULT=explode:rank=1:step=5 is not understood", "raise, exit, kill")
    assert not (folder / "run").exists()


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "number", "code"),
    [
        pytest.param("rank 1", signal.SIGTERM, 143, marks=pytest.mark.mpich_too),
        pytest.param("rank 1", signal.SIGINT, 130, marks=pytest.mark.slow),
        ("rank 1", signal.SIGKILL, None),
        pytest.param("mpirun", signal.SIGINT, None, marks=pytest.mark.mpich_too),  # Ctrl-C
        pytest.param("mpirun", signal.SIGTERM, None, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_job(
    to: str, number: signal.Signals, code: int | None, folder: Path, temporary: str
) -> None:
    args = [*TRAIN, "--layout", "pp2", "--train.steps", "100000", "--model.dropout", "0.1"]
    with Job(2, args, env={**HOME, "TMPDIR": temporary}, cwd=folder) as job:
        wait_for_step(job, folder, 3)
        since_s = time.monotonic()
        if to == "mpirun":
            job.signal(number)
        else:
            os.kill(job.rank_pids()[1], number)
        run = gone_at_once(job, since_s)
    assert run.rc != 0 and run.left_behind == 0, run.text
    assert "Traceback" not in run.text, run.text
    if code is not None:
        assert ended(run, code, f"stopped by {number.name}").startswith("[rank 1/2 "), run.text
    else:
        # mpirun itself was told, or a rank could not speak: at most one of ours speaks.
        assert run.stderr.count("[rank ") <= 1, run.text


# --- programs over the library --------------------------------------------------------------------


@pytest.mark.mpich_too
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("raises", 1, "[rank 1/3 {host}] ValueError: planted error (member.py:"),
        ("thread", 1, "[rank 1/3 {host}] ValueError: planted error (member.py:"),
        ("exit0", 76, "rank 1 left the job while"),
        pytest.param("exit7", 76, "rank 1 left the job while", marks=pytest.mark.slow),
    ],
)
def test_a_program_that_fails_on_one_rank(how: str, code: int, words: str, tmp_path: Path) -> None:
    with Job(3, [PLANTED / "member.py", how], env=HOME, cwd=tmp_path) as job:
        job.wait_for("rank 1 up")
        run = gone_at_once(job, time.monotonic())
    ended(run, code, words.format(host=os.uname().nodename))


def test_a_rank_that_waits_in_a_set_up_step_hears_signals(tmp_path: Path) -> None:
    args = [PLANTED / "member.py", "late for a set-up step"]
    with Job(2, args, env=HOME, cwd=tmp_path) as job:
        job.wait_for("rank 0 up")
        time.sleep(0.5)
        os.kill(job.rank_pids()[0], signal.SIGTERM)
        run = gone_at_once(job, time.monotonic())
    ended(run, 143, "stopped by SIGTERM")


@pytest.mark.slow
@pytest.mark.mpich_too
def test_a_rank_that_ends_later_than_the_others_is_no_fault(tmp_path: Path) -> None:
    run = run_ranks(3, [PLANTED / "member.py", "late to leave"], env=HOME, cwd=tmp_path)
    assert run.rc == 0 and run.stderr == "", run.text


@pytest.mark.mpich_too
def test_a_program_that_ends_well_ends_with_0(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    run = run_ranks(3, [PLANTED / "member.py", "well"], env=HOME, cwd=tmp_path)
    assert run.rc == 0 and run.stderr == "" and run.left_behind == 0, run.text
    assert run.stdout.count("sum [3.0, 3.0, 3.0]") == 3, run.text
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores // 3)
    assert run.stdout.count(f"with {threads} threads") == 3, run.text


# --- the start ------------------------------------------------------------------------------------


@pytest.mark.mpich_too
def test_ranks_with_other_settings_are_told_which(folder: Path) -> None:
    second = [":", "-n", "1", sys.executable, *TRAIN, "--model.seed", "2"]
    run = run_ranks(1, [*TRAIN, *second], env=HOME, cwd=folder)
    ended(run, 3, "rank 1 has other settings than rank 0", "model.seed is 2 there and 1 on rank 0")
    assert not (folder / "run").exists()


def test_ranks_with_another_text_are_refused(folder: Path) -> None:
    """Each host reads its own file; on one host a rank is started in a folder of its own."""
    other = folder / "other"
    other.mkdir()
    plant_text(other).write_bytes(plant_text(folder).read_bytes()[:-1] + b"!")
    change = f"import os, sys; os.chdir({str(other)!r}); sys.argv = ['train', *{TRAIN[2:]!r}]\n"
    second = [":", "-n", "1", sys.executable, "-c", change + "from mpmp.train import main; main()"]
    run = run_ranks(1, [*TRAIN, *second], env=HOME, cwd=folder)
    ended(run, 3, "rank 1 has other text in text.txt than rank 0")


@pytest.mark.mpich_too
@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_many_jobs_of_one_rank_are_refused(name: str, folder: Path) -> None:
    run = alone(TRAIN, folder, {name: "2"})
    ended(run, 3, "the launcher started 2 ranks", "sees one", "srun --mpi=pmix")
