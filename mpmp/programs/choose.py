"""Which algorithm moves a buffer, before anything was measured.

The thresholds are MPICH's (Thakur, Rabenseifner, Gropp 2005): few rounds for short messages, few
bytes for long ones.
"""

from __future__ import annotations

_SHORT_ALLREDUCE = 2048
_SHORT_ALLGATHER = 512 * 1024
_SHORT_REDUCE_SCATTER = 512 * 1024


def choose(collective: str, size: int, nbytes: int) -> str:
    """Name of the algorithm for ``nbytes`` in the whole buffer on a group of ``size`` ranks."""
    if collective == "allreduce":
        return "recursive_doubling" if nbytes <= _SHORT_ALLREDUCE else "ring"
    if collective == "reduce_scatter":
        return "recursive_halving" if nbytes <= _SHORT_REDUCE_SCATTER else "ring"
    if collective == "allgather":
        power_of_two = size & (size - 1) == 0
        return "recursive_doubling" if power_of_two and nbytes < _SHORT_ALLGATHER else "ring"
    return "binomial"
