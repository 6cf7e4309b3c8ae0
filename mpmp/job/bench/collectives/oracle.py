"""What a collective must give, elementwise and without any communication.

Inputs are small whole numbers: their sums are exact in every dtype (float16 and bfloat16 have whole
numbers up to 256), so results are compared bit for bit.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from mpmp.programs.partition import partition

PIECES = ("reduce_scatter", "allgather", "gather", "scatter", "alltoall")
"""Collectives in which every rank has a piece; all pieces of a timed array are alike."""
_LARGEST_VALUE = 12
_EXACT_IN_16_BITS = 256
_BLOCK = 1 << 18
"""Elements that are worked out at once, in the cache."""


def num_elements(collective: str, nbytes: int, size: int, itemsize: int) -> int:
    """Elements of an array of about ``nbytes``: the pieces of all ranks are of one length."""
    if collective == "barrier":
        return 0
    length = max(1, nbytes // itemsize)
    return max(1, length // size) * size if collective in PIECES else length


def values(rank: int, size: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Elements [start, stop) of the array of a rank; no two near places have the same pattern."""
    return _combined({_shift(rank, size): 1}, size, start, stop, dtype)


def _combined(
    times: dict[int, int], size: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """The arrays of all these shifts added, each so many times."""
    found = torch.empty(stop - start, dtype=dtype)
    for first in range(start, stop, _BLOCK):
        at = torch.arange(first, min(first + _BLOCK, stop))
        pattern = 3 * at + at // 64 + at // 4099
        total = torch.zeros_like(at)
        for shift, count in times.items():
            total += count * ((pattern + shift) % _modulus(size))
        found[first - start : first - start + len(at)] = total
    return found


def _shift(rank: int, size: int) -> int:
    return 5 * rank % _modulus(size)


def _modulus(size: int) -> int:
    return 1 + max(1, min(_LARGEST_VALUE, _EXACT_IN_16_BITS // size))


def given(collective: str, rank: int, size: int, length: int, dtype: torch.dtype) -> Tensor:
    """What ``rank`` brings; where only the root brings something, all have room for it."""
    start, stop = 0, length
    if collective in ("allgather", "gather"):
        start, stop = partition(length, size)[rank]
    return values(rank, size, start, stop, dtype)


def expected(
    collective: str, rank: int, size: int, length: int, dtype: torch.dtype
) -> Tensor | None:
    """What ``rank`` must end with; None where it ends with nothing. The root is rank 0."""
    start, stop = partition(length, size)[rank]
    if collective == "barrier" or (rank != 0 and collective in ("reduce", "gather")):
        return None
    if collective in ("allreduce", "reduce"):
        return _sum(size, 0, length, dtype)
    if collective == "reduce_scatter":
        return _sum(size, start, stop, dtype)
    if collective == "broadcast":
        return values(0, size, 0, length, dtype)
    if collective == "scatter":
        return values(0, size, start, stop, dtype)
    if collective in ("allgather", "gather"):
        pieces = enumerate(partition(length, size))
        return torch.cat([values(peer, size, first, end, dtype) for peer, (first, end) in pieces])
    assert collective == "alltoall", collective
    return torch.cat([values(peer, size, start, stop, dtype) for peer in range(size)])


def _sum(size: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    times = Counter(_shift(rank, size) for rank in range(size))
    return _combined(times, size, start, stop, dtype)


def num_wrong(found: Tensor | None, right: Tensor | None) -> int:
    """Elements that are not what they must be; NaN is never right."""
    if right is None:
        return 0
    if found is None or found.numel() != right.numel() or found.dtype != right.dtype:
        return max(right.numel(), 1)
    return int((found.view(-1) != right.view(-1)).sum())
