"""What the launcher tells a process about itself before MPI has started."""

from __future__ import annotations

import os
import socket

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
