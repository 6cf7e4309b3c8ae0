"""Message algorithms carried out on numbers, in one process, and what must come out.

A chunk is an array of its own here, so that nothing is shared with the code that cuts buffers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.follow import follow_collective
from mpmp.programs.partition import partition
from mpmp.programs.steps import Algorithm, Reduce

Chunk = NDArray[Any]
Cells = list[list[Chunk]]
"""[rank][chunk]"""
Combine = Callable[[Any, Any], Any]

ALGORITHMS = {
    (collective, name): algorithm
    for collective, table in COLLECTIVES.items()
    for name, algorithm in table.items()
    if isinstance(algorithm, Algorithm)
}
"""All that move messages; windows have tests of their own."""


def fact_sets(algorithm: Algorithm, size: int, roots: str = "some") -> list[dict[str, Any]]:
    """The facts an algorithm is tried with, none at all among them."""
    found: list[dict[str, Any]] = [{}]
    if "root" in algorithm.facts:
        tried = range(1, size) if roots == "all" else {size // 2, size - 1} - {0}
        found += [{"root": root} for root in tried]
    if "segments" in algorithm.facts:
        found += [{**found[-1], "segments": segments} for segments in (2, 5)]
    if "hosts" in algorithm.facts:
        pairs = tuple(rank // 2 for rank in range(size))
        in_turn = tuple(rank % 3 for rank in range(size))
        growing = tuple(int((2 * rank) ** 0.5) for rank in range(size))
        found += [{"hosts": hosts} for hosts in (pairs, in_turn, growing, tuple(range(size)))]
    return found


def run(algorithm: Algorithm, start: Cells, combine: Combine = np.add, **facts: Any) -> Cells:
    """The cells after all rounds; what a rank holds and what arrives is combined in rank order."""
    cells = [list(chunks) for chunks in start]
    for exchange in follow_collective(algorithm, len(start), **facts):
        arrived: dict[tuple[int, int], list[tuple[int, Chunk]]] = defaultdict(list)
        for message in exchange.messages:
            for send, put in zip(message.sends, message.puts, strict=True):
                for offset in range(send.count):
                    place = (message.receiver, put.chunk + offset)
                    payload = cells[message.sender][send.chunk + offset]
                    arrived[place].append((message.sender, payload))
                    if isinstance(put, Reduce) and len(arrived[place]) == 1:
                        arrived[place].append((place[0], cells[place[0]][place[1]]))
        for (rank, chunk), parts in arrived.items():
            parts.sort(key=lambda part: part[0])
            total = parts[0][1]
            for _, part in parts[1:]:
                total = combine(total, part)
            cells[rank][chunk] = total
    return cells


def whole_vectors(size: int, length: int, seed: int = 0) -> NDArray[Any]:
    """[rank, element]: what each rank puts in."""
    return np.random.default_rng(seed).integers(0, 1 << 40, (size, length))


def start_cells(collective: str, vectors: NDArray[Any], num_chunks: int) -> Cells:
    """The vectors cut into chunks; an all-to-all has its output behind its input."""
    size, length = vectors.shape
    parts = num_chunks // 2 if collective == "alltoall" else num_chunks
    cells = [[row[slice(*bounds)] for bounds in partition(length, parts)] for row in vectors]
    if collective == "alltoall":
        for rank, chunks in enumerate(cells):
            own = [chunks[rank] if peer == rank else chunks[rank] * 0 - 1 for peer in range(size)]
            chunks.extend(own)
    return cells


def summed(start: Cells, chunk: int) -> Chunk:
    total: Chunk = np.sum([chunks[chunk] for chunks in start], axis=0)
    return total


def assert_right(collective: str, start: Cells, end: Cells, root: int = 0) -> None:
    """Hold the cells at the end against the collective's meaning, written out."""
    size, num_chunks = len(start), len(start[0])
    ranks = range(size)
    for rank in ranks:
        for chunk in range(num_chunks):
            wanted: Any
            if collective == "allreduce":
                wanted = summed(start, chunk)
            elif collective == "reduce_scatter":
                wanted = summed(start, chunk) if chunk == rank else None
            elif collective == "allgather":
                wanted = start[chunk][chunk]
            elif collective == "broadcast":
                wanted = start[root][chunk]
            elif collective == "reduce":
                wanted = summed(start, chunk) if rank == root else None
            elif collective == "gather":
                wanted = start[chunk][chunk] if rank == root else None
            elif collective == "scatter":
                wanted = start[root][chunk] if chunk == rank else None
            elif collective == "alltoall":
                wanted = start[rank][chunk] if chunk < size else start[chunk - size][rank]
            else:
                raise AssertionError(f"nothing is written down for {collective}")
            if wanted is not None:
                np.testing.assert_array_equal(end[rank][chunk], wanted, f"{rank} {chunk}")
