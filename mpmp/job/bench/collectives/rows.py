"""A row is one contender's figure at one size; rows go into a CSV file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _pieces(ranks: int) -> float:
    return (ranks - 1) / ranks


BUS: dict[str, Callable[[int], float]] = {
    "allreduce": lambda ranks: 2 * _pieces(ranks),
    "reduce_scatter": _pieces,
    "allgather": _pieces,
    "broadcast": lambda ranks: 1.0,
    "reduce": lambda ranks: 1.0,
    "gather": _pieces,
    "scatter": _pieces,
    "alltoall": _pieces,
    "barrier": lambda ranks: 0.0,
}
"""busbw over algbw as nccl-tests define them; bytes are those of the whole array."""


@dataclass(frozen=True)
class Row:
    """One contender's figure, with the columns of the CSV file.

    ``time_us`` is the median over repeats of the slowest rank's time, ``wrong`` counts the elements
    on all ranks that were not what they must be.
    """

    collective: str
    algorithm: str
    dtype: str
    ranks: int
    bytes: int
    time_us: float
    algbw_GBps: float
    busbw_GBps: float
    wrong: int

    @classmethod
    def of(
        cls, collective: str, algorithm: str, dtype: str, ranks: int, nbytes: int, seconds: float,
        wrong: int,
    ) -> Row:  # fmt: skip
        """The row of a time; the bandwidths follow."""
        algbw = nbytes / seconds / 1e9
        bus = BUS[collective](ranks) * algbw
        return cls(collective, algorithm, dtype, ranks, nbytes, seconds * 1e6, algbw, bus, wrong)
