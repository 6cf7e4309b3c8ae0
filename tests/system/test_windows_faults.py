"""Faults in shared memory: a rank that ends in the middle of a sum, too little of it, or none."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import MPI_LIBRARY, Job, Run, run_ranks
from harness.launch import _mpirun, clean_environment
from system.small import HOME as PATHS
from system.small import PLANTED, ended

ROOT = Path(__file__).parents[2]
HOME = {**PATHS, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
GONE_S = 5.0
OF_MPI = re.compile(
    r"vader|sm_segment|openmpi|ompi|pmix|prte|psm|mpich|ucx|hwloc|mpi4py|MPI|mpl_shm|cma"
)
"""What the MPI libraries leave in /dev/shm is theirs."""
SMALL_SHM = "mount -t tmpfs -o size={size} tmpfs /dev/shm"
KIB_OF_MPI = {"openmpi": 0, "mpich": 2072}
"""What MPI itself takes of it at 2 ranks, so that the room is mpmp's: Open MPI goes elsewhere when
told to, MPICH dies of SIGBUS in MPI_Init where it has less."""
needs_root = pytest.mark.skipif(
    os.getuid() != 0
    or shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "--mount", "sh", "-c", SMALL_SHM.format(size="1m")], capture_output=True
    ).returncode
    != 0,
    reason="needs root, to mount another /dev/shm",
)


def names() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if not OF_MPI.search(name)}


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Names in /dev/shm and the room in it are after the test what they were before."""
    before = names()
    yield
    assert names() <= before


def shared_bytes(pid: int) -> int:
    """What a process has of the file that never had a name."""
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(entry.path).startswith("/dev/shm/#"):
                return os.stat(entry.path).st_blocks * 512
        except OSError:
            pass
    return 0


@pytest.mark.mpich_too
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("raise", 1, "ValueError: planted error (in_windows.py:"),
        ("exit", 76, "left the job"),
        ("kill", None, ""),
    ],
)
def test_a_rank_that_ends_in_the_middle_of_a_sum(
    how: str, code: int | None, words: str, tmp_path: Path, nothing_left: None
) -> None:
    with Job(3, [PLANTED / "in_windows.py", how], env=HOME, cwd=tmp_path) as job:
        for rank in range(3):
            job.wait_for(f"rank {rank} up")
        assert all(shared_bytes(pid) > 1_600_000 for pid in job.rank_pids().values())
        run = job.finish(60)
    assert run.rc != 0 and not run.timed_out and run.left_behind == 0, run.text
    assert "Traceback" not in run.text, run.text
    if code is not None:
        ended(run, code, words)
    else:
        assert run.stderr.count("[rank ") <= 1, run.text


def test_a_rank_killed_from_outside_in_a_sum(tmp_path: Path, nothing_left: None) -> None:
    with Job(2, [PLANTED / "in_windows.py", "forever"], env=HOME, cwd=tmp_path) as job:
        job.wait_for("rank 1 up")
        time.sleep(0.2)
        since_s = time.monotonic()
        os.kill(job.rank_pids()[1], signal.SIGKILL)
        run = job.finish(60)
        assert time.monotonic() - since_s < GONE_S, run.text
    assert run.rc != 0 and run.left_behind == 0, run.text


# --- another /dev/shm -----------------------------------------------------------------------------


def under(mounting: str, n: int, how: str, cwd: Path, *args: str) -> Run:
    """A job in a mount namespace of its own, whose mpirun has the job's usual environment."""
    command = [_mpirun(), "-n", str(n), sys.executable, str(PLANTED / "in_windows.py"), how, *args]
    words = " ".join(f"'{word}'" for word in command)
    began = time.monotonic()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{mounting} && exec {words}"],
        cwd=cwd,
        env=clean_environment(HOME),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Run(done.returncode, done.stdout, done.stderr, time.monotonic() - began, False, 0)


def one_line(run: Run, *words: str) -> None:
    """The sums are right, and of ours stands one line on stderr, with all of the words."""
    assert run.rc == 0 and run.stdout.count("sums are right") == 2, run.text
    assert "RuntimeWarning" not in run.stderr and "Traceback" not in run.stderr, run.text
    ours = [line for line in run.stderr.splitlines() if "/dev/shm" in line and "[rank" in line]
    assert len(ours) == 1, run.text
    assert all(word in ours[0] for word in words), run.text


@needs_root
@pytest.mark.parametrize(
    "kib",
    [pytest.param(64, marks=pytest.mark.slow), 1024, pytest.param(4096, marks=pytest.mark.slow)],
)
def test_too_little_room_falls_back_with_one_warning(kib: int, tmp_path: Path) -> None:
    """No room for a lane; for a lane but not for tensors; for some of the tensors."""
    env = "export OMPI_MCA_btl_sm_backing_directory=/tmp"
    size = f"{kib + KIB_OF_MPI[MPI_LIBRARY]}k"
    run = under(f"{SMALL_SHM.format(size=size)} && {env}", 2, "sums", tmp_path)
    one_line(run, "/dev/shm", "--shm-size")


@needs_root
def test_no_shared_memory_at_all_falls_back_with_one_warning(tmp_path: Path) -> None:
    mounting = "mount -t tmpfs -o ro,size=1m tmpfs /dev/shm"
    env = "export OMPI_MCA_btl_sm_backing_directory=/tmp"
    run = under(f"{mounting} && {env}", 2, "sums", tmp_path)
    if run.rc != 0 and "sums are right" not in run.stdout and "mpmp" not in run.stderr:
        pytest.skip("optional data: this MPI library itself does not start without /dev/shm")
    one_line(run, "/dev/shm", "share memory")


@needs_root
def test_enough_room_says_nothing(tmp_path: Path) -> None:
    run = under(SMALL_SHM.format(size="512m"), 2, "sums", tmp_path)
    assert run.rc == 0 and run.stdout.count("sums are right") == 2, run.text
    assert "/dev/shm" not in run.stderr, run.text


@pytest.mark.slow
def test_the_usual_place_says_nothing(tmp_path: Path, nothing_left: None) -> None:
    run = run_ranks(2, [PLANTED / "in_windows.py", "sums"], env=HOME, cwd=tmp_path)
    assert run.rc == 0 and run.stderr == "", run.text
