"""The collectives: one file an algorithm, one line in this table.

All work in place on one buffer that the algorithm's ``num_chunks(size)`` cuts into chunks:

- ``allreduce``: every chunk ends on every rank as the combination of all ranks;
- ``reduce_scatter``: chunk r ends complete on rank r, the other chunks are undefined;
- ``allgather``: rank r starts with chunk r, all end with all chunks;
- ``broadcast``: all end with the buffer of the fact ``root``.
"""

from __future__ import annotations

from mpmp.programs.collectives.allgather_recursive_doubling import ALLGATHER_RECURSIVE_DOUBLING
from mpmp.programs.collectives.allgather_ring import ALLGATHER_RING
from mpmp.programs.collectives.allreduce_recursive_doubling import ALLREDUCE_RECURSIVE_DOUBLING
from mpmp.programs.collectives.allreduce_ring import ALLREDUCE_RING
from mpmp.programs.collectives.broadcast_binomial import BROADCAST_BINOMIAL
from mpmp.programs.collectives.reduce_scatter_recursive_halving import (
    REDUCE_SCATTER_RECURSIVE_HALVING,
)
from mpmp.programs.collectives.reduce_scatter_ring import REDUCE_SCATTER_RING
from mpmp.programs.steps import Algorithm
from mpmp.programs.tables import look_up

COLLECTIVES: dict[str, dict[str, Algorithm]] = {
    "allreduce": {
        "ring": ALLREDUCE_RING,
        "recursive_doubling": ALLREDUCE_RECURSIVE_DOUBLING,
    },
    "reduce_scatter": {
        "ring": REDUCE_SCATTER_RING,
        "recursive_halving": REDUCE_SCATTER_RECURSIVE_HALVING,
    },
    "allgather": {
        "ring": ALLGATHER_RING,
        "recursive_doubling": ALLGATHER_RECURSIVE_DOUBLING,
    },
    "broadcast": {
        "binomial": BROADCAST_BINOMIAL,
    },
}


def find(collective: str, name: str) -> Algorithm:
    """The algorithm ``name`` of ``collective``; a ConfigError names the nearest known one."""
    algorithms = look_up(COLLECTIVES, collective, "collective")
    return look_up(algorithms, name, f"{collective} algorithm")
