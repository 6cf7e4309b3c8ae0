"""What each collective promises: whose contribution every chunk ends with, and as which chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpmp.errors import ProgramError
from mpmp.programs.exchange import Vector

EVERYBODY, NOTHING = -1, -2


@dataclass(frozen=True, slots=True)
class Promise:
    """[rank, chunk]: whose contribution a chunk must end with (a rank, EVERYBODY or NOTHING that
    was promised), which chunk of the input it must be, and which one it is at the start."""

    giver: Vector
    origin: Vector
    start: Vector


def _promise(
    size: int, num_chunks: int, giver: Any, *, one_per_rank: bool = False, only: Any = True
) -> Promise:
    """Every chunk stays in its place; ``giver`` gave it, promised where ``only`` says."""
    if one_per_rank and num_chunks != size:
        raise ProgramError(
            f"rank 0, round 0: the buffer is cut into {num_chunks} chunks and the collective "
            f"needs one for each of the {size} ranks"
        )
    chunk = np.tile(np.arange(num_chunks), (size, 1))
    return Promise(np.where(only, np.broadcast_to(giver, chunk.shape), NOTHING), chunk, chunk)


def _allreduce(size: int, num_chunks: int, **facts: Any) -> Promise:
    return _promise(size, num_chunks, EVERYBODY)


def _reduce_scatter(size: int, num_chunks: int, **facts: Any) -> Promise:
    own = np.eye(size, dtype=np.bool_)
    return _promise(size, num_chunks, EVERYBODY, one_per_rank=True, only=own)


def _allgather(size: int, num_chunks: int, **facts: Any) -> Promise:
    return _promise(size, num_chunks, np.arange(size), one_per_rank=True)


def _broadcast(size: int, num_chunks: int, *, root: int = 0, **facts: Any) -> Promise:
    return _promise(size, num_chunks, root)


def _reduce(size: int, num_chunks: int, *, root: int = 0, **facts: Any) -> Promise:
    at_root = np.arange(size)[:, None] == root
    return _promise(size, num_chunks, EVERYBODY, only=at_root)


def _gather(size: int, num_chunks: int, *, root: int = 0, **facts: Any) -> Promise:
    at_root = np.arange(size)[:, None] == root
    return _promise(size, num_chunks, np.arange(size), one_per_rank=True, only=at_root)


def _scatter(size: int, num_chunks: int, *, root: int = 0, **facts: Any) -> Promise:
    own = np.eye(size, dtype=np.bool_)
    return _promise(size, num_chunks, root, one_per_rank=True, only=own)


def _alltoall(size: int, num_chunks: int, **facts: Any) -> Promise:
    """Chunks 0..p-1 are the input and stay; p+q ends with chunk r of rank q on rank r, where the
    own piece lies from the start."""
    if num_chunks != 2 * size:
        raise ProgramError(
            f"rank 0, round 0: the buffer is cut into {num_chunks} chunks and an all-to-all on "
            f"{size} ranks has {size} for its input and {size} for its output"
        )
    ranks = np.arange(size)
    chunk = np.tile(np.arange(2 * size), (size, 1))
    giver, origin, start = chunk % size, chunk.copy(), chunk.copy()
    giver[:, :size] = origin[:, size:] = ranks[:, None]
    start[ranks, size + ranks] = ranks
    return Promise(giver, origin, start)


PROMISES: dict[str, Callable[..., Promise]] = {
    "allreduce": _allreduce,
    "reduce_scatter": _reduce_scatter,
    "allgather": _allgather,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "gather": _gather,
    "scatter": _scatter,
    "alltoall": _alltoall,
    "barrier": _allreduce,  # everybody has heard of everybody, maybe more than once
}
