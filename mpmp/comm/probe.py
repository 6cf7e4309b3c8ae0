"""Whether the running MPI moves device memory: tried in a child process that may crash.

An MPI without CUDA support reads a device pointer as host memory: a segfault, a hang or garbage.
Flags are not believed in either direction (``MPIX_Query_cuda_support`` tells how the library was
compiled, not whether its transports, the driver and this host allow it; with UCX it may say no
where yes is true). So children do what the executor does, non-blocking and prepared messages, from
the main thread and from a second one, and compare every byte; the exit code is the answer.

Two ranks come first, under the mpirun that lies beside the running library: a message to oneself
never takes the path between processes (CUDA IPC, UCX), which is the one that fails. Only where two
ranks cannot be started (no mpirun, as with Cray MPICH, or a batch system in its way) a single rank
sends to itself; the reason says so. Settings of the user (MCA parameters, UCX_*, CUDA_*) hold for
the children, what a launcher put into the environment does not.

``MPMP_CUDA_AWARE=0`` stages without asking. There is no 1: that would be believing.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpmp.comm.buffer import as_bytes
from mpmp.comm.mpi import MPI
from mpmp.errors import ConfigError

LIMIT_S = 30.0
"""Time a child has; nearly all of it goes into importing torch and waking the GPU."""
SIZES_BYTES = (4, 4 << 20)
"""A message that travels at once, and one that is agreed on first (rendezvous)."""

_STARTED = "mpmp probe: all ranks are there"
_WRONG, _ALONE = 41, 42
"""Exit codes of a child: bytes differ; mpirun started ranks that do not see each other."""
_GRACE_S = 3.0


@dataclass(frozen=True)
class Verdict:
    """How GPU tensors travel, and why."""

    aware: bool
    reason: str

    def __str__(self) -> str:
        return f"{'straight' if self.aware else 'staged'} ({self.reason})"


@dataclass(frozen=True)
class Child:
    """A command to try, and how it moves memory, in words."""

    command: Sequence[str]
    way: str


def probe(device: torch.device, limit_s: float = LIMIT_S) -> Verdict:
    """Whether MPI moves the memory of this GPU; to be called before MPI starts in this process."""
    wish = os.environ.get("MPMP_CUDA_AWARE", "")
    if wish == "0":
        return Verdict(False, "MPMP_CUDA_AWARE=0")
    if wish:
        raise ConfigError(
            f"MPMP_CUDA_AWARE may be 0 (stage all GPU tensors) or unset (find out), not {wish!r}"
        )
    return ask(children(device), limit_s)


def weakest(verdicts: Iterable[Verdict | None]) -> Verdict:
    """One answer for all ranks from those that asked: straight only where every host is able to."""
    asked = [verdict for verdict in verdicts if verdict is not None]
    refusals = [verdict for verdict in asked if not verdict.aware]
    return (refusals or asked or [Verdict(False, "no GPU")])[0]


# --- the parent's side --------------------------------------------------------------------------


def children(device: torch.device) -> list[Child]:
    """What to try: two ranks where the running library has an mpirun, then one."""
    trial = [sys.executable, "-m", "mpmp.comm.probe", str(device)]
    found = []
    mpirun = mpirun_beside(_running_library())
    if mpirun is not None:
        found.append(Child([mpirun, "-n", "2", *trial, "2"], "between two ranks"))
    found.append(Child([*trial, "1"], "within one rank, two could not be started"))
    return found


def mpirun_beside(library: Path | None) -> str | None:
    """The mpirun of the same installation as a libmpi: in ``bin`` of the nearest folder above."""
    for folder in library.parents if library is not None else ():
        mpirun = folder / "bin" / "mpirun"
        if os.access(mpirun, os.X_OK):
            return str(mpirun)
    return None


def _running_library() -> Path | None:
    """File of the MPI library that mpi4py has loaded into this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        file = line.split()[-1]
        if Path(file).name.startswith("libmpi.so"):
            return Path(file)
    return None


def ask(candidates: Sequence[Child], limit_s: float = LIMIT_S) -> Verdict:
    """Run the first child whose ranks start, and read its exit code."""
    reason = "nothing to ask"
    for child in candidates:
        code, output = _run(child.command, limit_s)
        if code == 0:
            return Verdict(True, f"a probe moved device memory {child.way}")
        reason = _why(code, output, limit_s)
        if _STARTED in output:
            break
    return Verdict(False, reason)


def _why(code: int | None, output: str, limit_s: float) -> str:
    if code is None:
        return f"a probe of device memory did not end within {limit_s:.0f} s"
    if code == _WRONG:
        return "a probe of device memory received wrong bytes"
    number = code - 128 if code > 128 else -code  # a shell's and mpirun's way, Python's way
    if number in {one.value for one in signal.Signals}:
        return f"a probe of device memory was ended by {signal.Signals(number).name}"
    said = [line.strip() for line in output.splitlines() if "Error" in line]
    return f"a probe of device memory ended with code {code}" + (f": {said[-1]}" if said else "")


def _run(command: Sequence[str], limit_s: float) -> tuple[int | None, str]:
    """Exit code (None: no end within the limit) and output of a child."""
    # A file and not a pipe: a rank that outlives mpirun would keep a pipe open.
    with tempfile.TemporaryFile() as output:
        try:
            child = subprocess.Popen(
                command,
                env=environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error)
        try:
            code: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            # mpirun passes SIGTERM on to its ranks; SIGKILL would leave them running.
            for number in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(child.pid, number)
                try:
                    child.wait(_GRACE_S)
                    break
                except subprocess.TimeoutExpired:
                    pass
        output.seek(0)
        return code, output.read().decode(errors="replace")


_OF_A_JOB = (
    "PMI_", "PMI2_", "PMIX_", "PRTE_", "OMPI_", "ORTE_", "OPAL_", "HYDRA_", "HYDI_", "MPI_LOCAL",
    "MPIEXEC_", "SLURM_", "PALS_", "PBS_", "LSB_", "FLUX_",
)  # fmt: skip
_OF_A_JOB_DESPITE_MCA = tuple(
    f"OMPI_MCA_{name}"
    for name in ("PREFIXES", "cpu_type", "initial_wdir", "num_procs", "ess", "orte_")
)
_FOR_TWO_RANKS = {
    # A rank may be bound to one core and run as root in a container; so must two of the probe.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    "OMP_NUM_THREADS": "1",
}


def environment(outer: Mapping[str, str]) -> dict[str, str]:
    """A rank's environment without what its launcher put there, so that a new job can start in it.

    Kept are the settings of the user (``*_MCA_*``) and where a moved library lies (``*_PREFIX``).
    """
    kept = {}
    for name, value in outer.items():
        setting = ("_MCA_" in name or name.endswith("_PREFIX")) and not name.startswith(
            _OF_A_JOB_DESPITE_MCA
        )
        if setting or not name.startswith(_OF_A_JOB):
            kept[name] = value
    # The child imports this very mpmp, wherever it was found.
    here = str(Path(__file__).resolve().parents[2])
    path = [here, *filter(None, [outer.get("PYTHONPATH")])]
    return {**kept, **_FOR_TWO_RANKS, "PYTHONPATH": os.pathsep.join(path)}


# --- the child's side ---------------------------------------------------------------------------


def exchange(comm: MPI.Intracomm, device: torch.device) -> bool:
    """Send to the right and receive from the left by every call that the executor makes."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    good = True
    for nbytes in SIZES_BYTES:
        mine, wanted = _pattern(nbytes, comm.rank, device), _pattern(nbytes, left, device)
        arrived = torch.empty_like(wanted)

        def differ(arrived: Tensor = arrived, wanted: Tensor = wanted) -> None:
            torch.bitwise_not(wanted, out=arrived)  # a byte that does not arrive is wrong
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

        differ()
        _wait([comm.Irecv(as_bytes(arrived), left), comm.Isend(as_bytes(mine), right)])
        good &= torch.equal(arrived, wanted)
        prepared = [comm.Recv_init(as_bytes(arrived), left), comm.Send_init(as_bytes(mine), right)]
        for _ in range(2):
            differ()
            MPI.Prequest.Startall(prepared)
            _wait(prepared)
            good &= torch.equal(arrived, wanted)
        for request in prepared:
            request.Free()
    return good


def _pattern(nbytes: int, rank: int, device: torch.device) -> Tensor:
    # 251 is prime: no block of a power of two repeats, so misplaced blocks are seen.
    return ((torch.arange(nbytes, device=device) * 7 + 13 * rank + 1) % 251).to(torch.uint8)


def _wait(requests: Sequence[MPI.Request]) -> None:
    while not MPI.Request.Testall(requests):
        pass


def _try(device: torch.device, num_ranks: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The last resort if nobody stops a child that hangs: the default action needs no Python.
    signal.alarm(int(LIMIT_S + 2 * _GRACE_S))
    if device.type == "cuda":
        from mpmp.launcher import told_local_rank

        # As the world chooses: two ranks take two cards where there are two.
        index = ((device.index or 0) + told_local_rank()) % torch.cuda.device_count()
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.empty(1, device=device)
    threads = MPI.Init_thread(MPI.THREAD_MULTIPLE) == MPI.THREAD_MULTIPLE
    comm = MPI.COMM_WORLD
    if comm.size != num_ranks:
        sys.exit(_ALONE)
    comm.Barrier()
    if comm.rank == 0:
        print(_STARTED, flush=True)
    good = [exchange(comm, device)]

    def aside() -> None:
        if device.type == "cpu":
            good.append(exchange(comm, device))
            return
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            good.append(exchange(comm, device))

    # Started operations are driven by a thread, and autograd sends from threads of its own.
    if threads:
        thread = threading.Thread(target=aside)
        thread.start()
        thread.join()
    if not (all(good) and len(good) == 1 + threads):
        comm.Abort(_WRONG)
    MPI.Finalize()


if __name__ == "__main__":
    _try(torch.device(sys.argv[1]), int(sys.argv[2]))
