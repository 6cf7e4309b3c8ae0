"""Every collective and message on GPU tensors, of all dtypes, short and long.

Values are small integers, exact in every dtype, so that results must be equal to the last bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpmp.comm.buffer import DTYPES, FLOATS
from mpmp.comm.carrier import SLOT_BYTES
from mpmp.comm.group import Group
from mpmp.programs.collectives import COLLECTIVES
from mpmp.programs.partition import partition
from mpmp.programs.steps import Algorithm

pytestmark = pytest.mark.ranks(1, 2, 4)

ROWS = (1, 37, SLOT_BYTES // 4)
"""Fewer rows than ranks, rows that do not divide, a buffer beyond the staging slots."""


def values(length: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows (length, 2) that differ between ranks and between elements."""
    return ((torch.arange(2 * length, device=device) + 3 * rank) % 7).to(dtype).view(length, 2)


def algorithms(collective: str) -> list[str]:
    """Those that send messages; windows have tests of their own."""
    table = COLLECTIVES[collective]
    return [name for name, one in table.items() if isinstance(one, Algorithm)]


def same(found: Tensor, wanted: Tensor, device: torch.device) -> None:
    assert found.device == device
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("algorithm", algorithms("allreduce"))
@pytest.mark.parametrize("dtype", (*FLOATS, torch.int64, torch.uint8))
def test_allreduce(
    group: Group, device: torch.device, dtype: torch.dtype, algorithm: str, rows: int
) -> None:
    all_ = [values(rows, rank, dtype, device) for rank in range(group.size)]
    mine = all_[group.rank].clone()
    total = group.allreduce(mine, algorithm=algorithm)
    highest = group.allreduce(mine, op="max", algorithm=algorithm)
    untouched = mine.clone()
    group.allreduce(mine, algorithm=algorithm, out=mine)
    same(total, torch.stack(all_).sum(0, dtype=dtype), device)
    same(highest, torch.stack(all_).amax(0), device)
    same(untouched, all_[group.rank], device)
    same(mine, total, device)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("algorithm", algorithms("reduce_scatter"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_reduce_scatter(
    group: Group, device: torch.device, dtype: torch.dtype, algorithm: str, rows: int
) -> None:
    all_ = [values(rows, rank, dtype, device) for rank in range(group.size)]
    piece = group.reduce_scatter(all_[group.rank], algorithm=algorithm)
    start, stop = partition(rows, group.size)[group.rank]
    same(piece, torch.stack(all_).sum(0, dtype=dtype)[start:stop], device)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("algorithm", algorithms("allgather"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.bool))
def test_allgather(
    group: Group, device: torch.device, dtype: torch.dtype, algorithm: str, rows: int
) -> None:
    lengths = [rows + rank for rank in range(group.size)]
    all_ = [values(length, rank, dtype, device) for rank, length in enumerate(lengths)]
    found = group.allgather(all_[group.rank], lengths, algorithm=algorithm)
    same(found, torch.cat(all_), device)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_from_every_root(
    group: Group, device: torch.device, dtype: torch.dtype, rows: int
) -> None:
    mine = values(rows, group.rank, dtype, device)
    found = [group.broadcast(mine, root) for root in range(group.size)]
    for root in range(group.size):
        same(found[root], values(rows, root, dtype, device), device)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_to_a_root_and_from_it(
    group: Group, device: torch.device, dtype: torch.dtype, rows: int
) -> None:
    size, root = group.size, group.size - 1
    all_ = [values(rows, rank, dtype, device) for rank in range(size)]
    total = group.reduce(all_[group.rank], root)
    gathered = group.gather(all_[group.rank], root)
    row = group.scatter(torch.cat(all_), root)
    assert (total is None) == (gathered is None) == (group.rank != root)
    if total is not None and gathered is not None:
        same(total, torch.stack(all_).sum(0, dtype=dtype), device)
        same(gathered, torch.cat(all_), device)
    same(row, all_[group.rank], device)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("algorithm", algorithms("alltoall"))
def test_alltoall(group: Group, device: torch.device, algorithm: str, rows: int) -> None:
    size = group.size
    all_ = [values(rows * size, rank, torch.bfloat16, device) for rank in range(size)]
    found = group.alltoall(all_[group.rank], algorithm=algorithm)
    mine = [x[rows * group.rank : rows * (group.rank + 1)] for x in all_]
    same(found, torch.cat(mine), device)


@pytest.mark.parametrize("rows", (0, *ROWS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_messages_round_a_ring(
    group: Group, device: torch.device, dtype: torch.dtype, rows: int
) -> None:
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    arrived = torch.empty(rows, 2, dtype=dtype, device=device)
    transfers = [
        group.receive(arrived, left, tag=5),
        group.send(values(rows, group.rank, dtype, device), right, tag=5),
    ]
    for transfer in transfers:
        transfer.wait()
    same(arrived, values(rows, left, dtype, device), device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_started_sums_are_replayed(group: Group, device: torch.device, dtype: torch.dtype) -> None:
    buckets = [torch.empty(length, dtype=dtype, device=device) for length in (5, 200_000, 0, 77)]
    sums = [group.prepare_allreduce(bucket) for bucket in buckets]
    for step in range(3):
        handles = []
        for number, (bucket, sum_) in enumerate(zip(buckets, sums, strict=True)):
            bucket.fill_(group.rank + step + number)
            handles.append(sum_.start())
        for handle in handles:
            handle.wait()
        ranks = group.size * (group.size - 1) // 2
        for number, bucket in enumerate(buckets):
            wanted = torch.full_like(bucket, ranks + group.size * (step + number))
            same(bucket, wanted, device)
