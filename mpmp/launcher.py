"""What the launcher tells a process about itself, and the one line before MPI has started."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

_RANK_AND_SIZE = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("PALS_RANKID", "PALS_SIZE"),
)
_LOCAL_RANK = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
    "PALS_LOCAL_RANKID",
)

_LONGEST = 400
"""Characters of a message: a value that is echoed may be of any length."""


def told_rank() -> int:
    """Rank in the job; 0 without a launcher."""
    return next((int(os.environ[rank]) for rank, _ in _RANK_AND_SIZE if rank in os.environ), 0)


def told_size() -> int:
    """Ranks that were started; 1 without a launcher."""
    return next((int(os.environ[size]) for _, size in _RANK_AND_SIZE if size in os.environ), 1)


def told_local_rank() -> int:
    """Rank on this host; 0 without a launcher."""
    return next((int(os.environ[name]) for name in _LOCAL_RANK if name in os.environ), 0)


def told_name() -> str:
    """How messages name this rank as long as MPI does not."""
    return f"rank {told_rank()}/{told_size()} {socket.gethostname()}"


def say_once(sentence: str) -> None:
    """Print why this process ends, as one line, unless another child of the launcher has.

    A name in the abstract socket space is taken atomically and vanishes with its owner. Rank 0
    has a head start; whoever has the name keeps it until the others have made the same mistake.
    """
    sentence = " ".join(sentence.split())
    if len(sentence) > _LONGEST:
        sentence = sentence[:_LONGEST] + " ..."
    alone = told_size() == 1
    if told_rank() != 0:
        time.sleep(0.3)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
        try:
            if not alone:
                speaker.bind(f"\0mpmp.{os.getppid()}")
        except OSError:
            return
        print(f"[{told_name()}] {sentence}", file=sys.stderr, flush=True)
        if not alone:
            time.sleep(1.0)


_LAUNCHERS = {"mpirun", "mpiexec", "prterun", "prte", "prted", "hydra_pmi_proxy", "mpiexec.hydra"}


def terminal_of_launcher() -> str | None:
    """The terminal that standard output reaches in the end, if a person watches.

    Ranks write to a pipe or to a pseudo-terminal of the launcher's own, whatever the launcher
    itself writes to: so the launcher's standard output is asked.
    """
    try:
        pid, parent = os.getpid(), os.getppid()
        while Path(f"/proc/{parent}/comm").read_text().strip() in _LAUNCHERS:
            stat = Path(f"/proc/{parent}/stat").read_text()
            pid, parent = parent, int(stat.rsplit(")", 1)[1].split()[1])
        device = os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return None
    return device if device.startswith(("/dev/pts/", "/dev/tty")) else None
