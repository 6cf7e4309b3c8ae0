"""The collectives: one file an algorithm, one line in this table.

All work in place on one buffer that the algorithm's ``num_chunks(size, **facts)`` cuts into chunks:

- ``allreduce``: every chunk ends on every rank as the combination of all ranks;
- ``reduce_scatter``: chunk r ends complete on rank r, the other chunks are undefined;
- ``allgather``: rank r starts with chunk r, all end with all chunks;
- ``broadcast``: all end with the buffer of the fact ``root``;
- ``reduce``: every chunk ends on ``root`` as the combination of all ranks, elsewhere undefined;
- ``gather``: rank r starts with chunk r, ``root`` ends with all chunks;
- ``scatter``: ``root`` starts with all chunks, rank r ends with chunk r;
- ``alltoall``: the buffer is 2p chunks; the input 0..p-1 stays as it is, and the output chunk p + q
  ends as chunk r of rank q on rank r, where the own piece lies from the start;
- ``barrier``: one chunk, a byte without meaning; nobody ends before all have begun.
"""

from __future__ import annotations

from mpmp.programs.collectives.allgather_bruck import ALLGATHER_BRUCK
from mpmp.programs.collectives.allgather_recursive_doubling import ALLGATHER_RECURSIVE_DOUBLING
from mpmp.programs.collectives.allgather_ring import ALLGATHER_RING
from mpmp.programs.collectives.allgather_window import ALLGATHER_WINDOW
from mpmp.programs.collectives.allreduce_direct import ALLREDUCE_DIRECT
from mpmp.programs.collectives.allreduce_double_binary_tree import ALLREDUCE_DOUBLE_BINARY_TREE
from mpmp.programs.collectives.allreduce_hierarchical import ALLREDUCE_HIERARCHICAL
from mpmp.programs.collectives.allreduce_one_shot import ALLREDUCE_ONE_SHOT
from mpmp.programs.collectives.allreduce_rabenseifner import ALLREDUCE_RABENSEIFNER
from mpmp.programs.collectives.allreduce_recursive_doubling import ALLREDUCE_RECURSIVE_DOUBLING
from mpmp.programs.collectives.allreduce_reduce_broadcast import ALLREDUCE_REDUCE_BROADCAST
from mpmp.programs.collectives.allreduce_ring import ALLREDUCE_RING
from mpmp.programs.collectives.allreduce_swing import ALLREDUCE_SWING
from mpmp.programs.collectives.allreduce_two_shot import ALLREDUCE_TWO_SHOT
from mpmp.programs.collectives.allreduce_window import ALLREDUCE_WINDOW
from mpmp.programs.collectives.alltoall_bruck import ALLTOALL_BRUCK
from mpmp.programs.collectives.alltoall_pairwise import ALLTOALL_PAIRWISE
from mpmp.programs.collectives.barrier_dissemination import BARRIER_DISSEMINATION
from mpmp.programs.collectives.barrier_window import BARRIER_WINDOW
from mpmp.programs.collectives.broadcast_binomial import BROADCAST_BINOMIAL
from mpmp.programs.collectives.broadcast_chain import BROADCAST_CHAIN
from mpmp.programs.collectives.broadcast_scatter_allgather import BROADCAST_SCATTER_ALLGATHER
from mpmp.programs.collectives.broadcast_window import BROADCAST_WINDOW
from mpmp.programs.collectives.gather_binomial import GATHER_BINOMIAL
from mpmp.programs.collectives.reduce_binomial import REDUCE_BINOMIAL
from mpmp.programs.collectives.reduce_scatter_direct import REDUCE_SCATTER_DIRECT
from mpmp.programs.collectives.reduce_scatter_pairwise import REDUCE_SCATTER_PAIRWISE
from mpmp.programs.collectives.reduce_scatter_recursive_halving import (
    REDUCE_SCATTER_RECURSIVE_HALVING,
)
from mpmp.programs.collectives.reduce_scatter_ring import REDUCE_SCATTER_RING
from mpmp.programs.collectives.reduce_scatter_window import REDUCE_SCATTER_WINDOW
from mpmp.programs.collectives.scatter_binomial import SCATTER_BINOMIAL
from mpmp.programs.steps import Algorithm
from mpmp.programs.tables import look_up
from mpmp.programs.windows import WindowAlgorithm

COLLECTIVES: dict[str, dict[str, Algorithm | WindowAlgorithm]] = {
    "allreduce": {
        "ring": ALLREDUCE_RING,
        "recursive_doubling": ALLREDUCE_RECURSIVE_DOUBLING,
        "rabenseifner": ALLREDUCE_RABENSEIFNER,
        "reduce_broadcast": ALLREDUCE_REDUCE_BROADCAST,
        "double_binary_tree": ALLREDUCE_DOUBLE_BINARY_TREE,
        "swing": ALLREDUCE_SWING,
        "hierarchical": ALLREDUCE_HIERARCHICAL,
        "direct": ALLREDUCE_DIRECT,
        "window": ALLREDUCE_WINDOW,
        "one_shot": ALLREDUCE_ONE_SHOT,
        "two_shot": ALLREDUCE_TWO_SHOT,
    },
    "reduce_scatter": {
        "ring": REDUCE_SCATTER_RING,
        "recursive_halving": REDUCE_SCATTER_RECURSIVE_HALVING,
        "pairwise": REDUCE_SCATTER_PAIRWISE,
        "direct": REDUCE_SCATTER_DIRECT,
        "window": REDUCE_SCATTER_WINDOW,
    },
    "allgather": {
        "ring": ALLGATHER_RING,
        "recursive_doubling": ALLGATHER_RECURSIVE_DOUBLING,
        "bruck": ALLGATHER_BRUCK,
        "window": ALLGATHER_WINDOW,
    },
    "broadcast": {
        "binomial": BROADCAST_BINOMIAL,
        "scatter_allgather": BROADCAST_SCATTER_ALLGATHER,
        "chain": BROADCAST_CHAIN,
        "window": BROADCAST_WINDOW,
    },
    "reduce": {
        "binomial": REDUCE_BINOMIAL,
    },
    "gather": {
        "binomial": GATHER_BINOMIAL,
    },
    "scatter": {
        "binomial": SCATTER_BINOMIAL,
    },
    "alltoall": {
        "pairwise": ALLTOALL_PAIRWISE,
        "bruck": ALLTOALL_BRUCK,
    },
    "barrier": {
        "dissemination": BARRIER_DISSEMINATION,
        "window": BARRIER_WINDOW,
    },
}


def find(collective: str, name: str) -> Algorithm | WindowAlgorithm:
    """The algorithm ``name`` of ``collective``; a ConfigError names the nearest known one."""
    algorithms = look_up(COLLECTIVES, collective, "collective")
    return look_up(algorithms, name, f"{collective} algorithm")
