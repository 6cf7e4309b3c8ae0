"""Emulated hosts on one machine: ranks that share no memory, joined by links of a chosen speed.

    with Hosts(4, ranks_per_host=2, rate_mbit=200, delay_us=1000) as hosts:
        run = hosts.run(["-m", "mpmp.verify", "--layout", "all"], timeout=60)
        assert run.rc == 0, run.text

    python tests/hosts/emulate.py --hosts 4 --rate 200 --delay-us 1000 -- -m mpmp.verify

Each host has its own network, hostname, /dev/shm and temporary directory; the links are those of
``switch.c``; the MPI library of this Python's environment starts its ranks with ``agent.sh`` in
place of ssh. Linux only; needs root, ``ip``, ``nsenter`` and ``cc``. Whatever way it ends, nothing
is left: the kernel ends all processes of the emulation with this one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)

from harness.launch import (  # noqa: E402
    MPI_LIBRARY,
    ROOT,
    Run,
    _end_with_parent,
    _mpirun,
    clean_environment,
)

_TIMED_OUT = 124
_MOST_S = 3600.0


def lacking() -> str | None:
    """What this machine lacks for emulated hosts, in words (needs root ...), or None."""
    missing = [name for name in ("ip", "nsenter", "unshare", "cc") if shutil.which(name) is None]
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make networks"
    if missing:
        return f"needs root and the commands {', '.join(missing)}"
    if not Path("/dev/net/tun").exists():
        return "needs root and /dev/net/tun"
    trial = ["unshare", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount", "true"]
    if subprocess.run(trial, capture_output=True).returncode != 0:
        return "needs root with the right to make namespaces"
    return None


class Hosts:
    """A number of hosts and how they are linked; every run gets them new.

    ``rate_mbit`` is a link's rate in each direction, 0 for none; ``delay_us`` the time from any
    host to any other. Ranks fill the hosts in order, or are dealt out to them in turns.
    """

    def __init__(
        self,
        hosts: int,
        ranks_per_host: int = 1,
        *,
        rate_mbit: float = 200,
        delay_us: float = 1000,
        dealt: bool = False,
    ) -> None:
        self.hosts, self.ranks_per_host, self.dealt = hosts, ranks_per_host, dealt
        self.rate_mbit, self.delay_us = rate_mbit, delay_us

    def __enter__(self) -> Hosts:
        self._folder = Path(tempfile.mkdtemp(prefix="mpmp-hosts-"))
        try:
            self._switch = self._folder / "switch"
            source = str(HERE / "switch.c")
            subprocess.run(["cc", "-O2", "-o", str(self._switch), source], check=True)
            (self._folder / "tmp").mkdir()
            names = [f"10.77.0.{i} h{i}\n" for i in range(1, self.hosts + 1)]
            (self._folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        shutil.rmtree(self._folder)

    def run(
        self,
        args: Sequence[str | Path],
        *,
        timeout: float = 60,
        env: Mapping[str, str | None] | None = None,
        cwd: str | Path = ROOT,
    ) -> Run:
        """``python ARGS`` on every rank, to its end or to ``timeout`` seconds (rc 124)."""
        # Files and not pipes, so that output which nobody reads holds nobody up.
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            start = time.monotonic()
            rc = self.call(args, timeout=timeout, env=env, cwd=cwd, stdout=stdout, stderr=stderr)
            seconds = time.monotonic() - start
            words = []
            for file in (stdout, stderr):
                file.seek(0)
                words.append(file.read().decode(errors="replace"))
        return Run(rc, *words, seconds, timed_out=rc == _TIMED_OUT, left_behind=0)

    def call(
        self,
        args: Sequence[str | Path],
        *,
        timeout: float = _MOST_S,
        env: Mapping[str, str | None] | None = None,
        cwd: str | Path = ROOT,
        stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
    ) -> int:
        """As ``run``, with the output where ours goes; the exit code."""
        agent = HERE / "agent.sh"
        ranks = [sys.executable, *map(str, args)]
        network = [str(self.hosts), str(self.delay_us), str(self.rate_mbit)]
        # mpirun runs on the first host, process 2; entering its mounts leaves the directory.
        inside = ["nsenter", "--target", "2", "--net", "--uts", "--ipc", "--mount", "--"]
        inside += ["sh", "-c", 'cd "$0" && exec "$@"', str(Path(cwd).resolve())]
        process = subprocess.Popen(
            [self._switch, *network, self._folder, *inside, *self._mpirun(agent), *ranks],
            cwd=cwd,
            env=self._environment(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return _TIMED_OUT
        finally:
            process.kill()
            process.wait()

    def _mpirun(self, agent: Path) -> list[str]:
        ranks = ["-n", str(self.hosts * self.ranks_per_host)]
        slots = self.ranks_per_host
        if MPI_LIBRARY == "mpich":  # which goes round the hosts until all ranks have one
            names = self._names(1 if self.dealt else slots)
            launcher = ["-launcher", "ssh", "-launcher-exec", str(agent)]
            return [_mpirun(), *launcher, "-hosts", names, *ranks]
        launcher = ["--prtemca", "plm_ssh_agent", str(agent)]
        order = ["--map-by", "node"] if self.dealt else []
        return [_mpirun(), *launcher, *order, "--host", self._names(slots), *ranks]

    def _names(self, slots: int) -> str:
        return ",".join(f"10.77.0.{i}:{slots}" for i in range(1, self.hosts + 1))

    def _environment(self, extra: Mapping[str, str | None]) -> dict[str, str]:
        binaries = str(Path(sys.executable).parent)
        sources = os.environ.get("PYTHONPATH")
        ours: dict[str, str | None] = {
            "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *([sources] if sources else [])]),
            "TMPDIR": str(self._folder / "tmp"),
            # What all ranks of one host do in env.sh, the first of several hosts would have to do.
            "PRTE_MCA_rmaps_default_mapping_policy": None,
            # All hosts together have this machine's cores, which the library cannot know.
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "OMP_NUM_THREADS": "1",
        }
        return clean_environment({**ours, **extra})


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--dealt", action="store_true", help="ranks go round the hosts")
    parser.add_argument("--rate", type=float, default=200, help="Mbit/s of a link; 0: no limit")
    parser.add_argument("--delay-us", type=float, default=1000, help="from any host to any other")
    parser.add_argument("--timeout", type=float, default=600, help="seconds")
    parser.add_argument("args", nargs="+", help="what each rank's python is given, after --")
    asked = parser.parse_args()
    if reason := lacking():
        parser.error(reason)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    placed = Hosts(
        asked.hosts,
        asked.ranks_per_host,
        rate_mbit=asked.rate,
        delay_us=asked.delay_us,
        dealt=asked.dealt,
    )
    with placed as hosts:
        return hosts.call(asked.args, timeout=asked.timeout, cwd=Path.cwd())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
