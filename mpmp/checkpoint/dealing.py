"""Reading: each needed block is read once, by one rank, verified, and its parts are dealt out.

    all ranks say which blocks they want; those that anybody wants are shared out evenly
    block    0  1  2  3 | 4  5  6  7 |          rank 0 reads the first, rank 1 the next ones
    round 0  0  1       | 4  5                  read and verified by threads ..
             all-to-all: every part to the rank that wants it
    round 1        2  3 |       6  7            .. while the round before is dealt out

A round takes bounded memory. What is wrong is told at the end: nobody uses a tensor before all
ranks know that all blocks were good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpmp.checkpoint.contents import Contents
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.needs import Catalogue, Need
from mpmp.checkpoint.reader import Reader
from mpmp.checkpoint.rounds import Rounds, Sorted, size_of
from mpmp.comm.agreement import together
from mpmp.errors import CheckpointError

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh

Memory = NDArray[Any]
"""Bytes of a wanted extent."""


class DamageError(CheckpointError):
    """Files that are not what they were: a reason to take an older checkpoint."""


def read(contents: Contents, held: Sequence[Held], mesh: Mesh) -> int:
    """Fill tensors from files, all ranks together; the bytes that this rank has read.

    Raises, on every rank alike, CheckpointError where a tensor is not there or of another shape,
    and DamageError where a file is not what it was; tensors are half filled then.
    """
    files = Catalogue(contents)
    together("look for tensors", lambda: _require(contents, held), mesh)
    landings = [_Landing(one, contents.tensors[one.key].dtype) for one in held]
    wanted = [
        (need, landing.memory)
        for one, landing in zip(held, landings, strict=True)
        for need in files.needs(one.key, one.extent)
    ]
    with Reader(files) as reader:
        deal = _Deal(files, wanted, mesh)
        deal.all(reader)
    for fault in together("read", lambda: reader.fault or deal.fault, mesh):
        if fault is not None:
            raise DamageError(fault)
    for landing in landings:
        landing.finish()
    return reader.read_bytes


def _require(contents: Contents, held: Sequence[Held]) -> None:
    for one in held:
        stored = contents.tensors.get(one.key)
        if stored is None or stored.shape != one.shape:
            there = "no such tensor" if stored is None else f"a tensor of shape {stored.shape}"
            raise CheckpointError(
                f"the files are of another model: {one.key} has the shape {one.shape} in this run "
                f"and there is {there}; use the model and vocabulary they were made with"
            )


class _Landing:
    """Memory for the bytes of a wanted tensor: its own where it is as in the file, on the host."""

    def __init__(self, held: Held, dtype: torch.dtype) -> None:
        self._tensor = held.tensor.detach()
        self._apart: Tensor | None = None
        plain = not self._tensor.is_cuda and self._tensor.is_contiguous()
        if not plain or self._tensor.dtype != dtype:
            self._apart = torch.empty(held.extent.size, dtype=dtype)
        flat = self._tensor.view(-1) if self._apart is None else self._apart
        self.memory: Memory = flat.view(torch.uint8).numpy()

    def finish(self) -> None:
        """Have the elements in the tensor."""
        if self._apart is not None:
            self._tensor.copy_(self._apart.view(self._tensor.shape))


class _Deal:
    """One reading: what this rank wants, what others want of the blocks that it reads."""

    def __init__(self, files: Catalogue, wanted: Sequence[tuple[Need, Memory]], mesh: Mesh) -> None:
        self._group, self._memories = mesh.everyone, [memory for _, memory in wanted]
        needs = [need for need, _ in wanted]
        parts = files.parts(needs, range(files.num_blocks))
        # Only a forged manifest has pieces that lie on each other and leave a gap elsewhere.
        memory_bytes = sum({id(one): len(one) for one in self._memories}.values())
        self.fault = None if size_of(parts) == memory_bytes else "has a manifest with a gap"
        wanted_by = np.zeros(files.num_blocks, dtype=np.int64)
        wanted_by[[part.block for part in parts]] = 1
        if self._group.size > 1:
            wanted_by = self._group.allreduce(torch.from_numpy(wanted_by)).numpy()
        self._rounds = Rounds(files, wanted_by, self._group.size)
        self._blocks = self._rounds.blocks(self._group.rank)
        self._coming = Sorted(parts, self._rounds)
        self._going = self._others(files, needs)

    def all(self, reader: Reader) -> None:
        """Read and deal out, round by round; the next one's blocks are read meanwhile."""
        ahead = reader.start(self._blocks.get(0, []))
        for turn in range(self._rounds.number):
            now, ahead = ahead, reader.start(self._blocks.get(turn + 1, []))
            blocks = {block: one.result() for block, one in now.items()}
            for part in self._coming.of(self._group.rank, turn):
                part.pass_on(blocks[part.block], self._memories[part.need])
            if self._group.size > 1:
                self._exchange(turn, blocks)

    def _exchange(self, turn: int, blocks: Mapping[int, Memory]) -> None:
        """Give the others the parts they want of these blocks, and take ours of theirs."""
        group = self._group
        going = [one.of(group.rank, turn) for one in self._going]
        lengths = [size_of(parts) for parts in going]
        sent, at = np.empty(sum(lengths), dtype=np.uint8), 0
        for part in (part for parts in going for part in parts):
            part.take(blocks[part.block], sent[at : at + part.size_bytes])
            at += part.size_bytes
        given, at = group.alltoall(torch.from_numpy(sent), lengths).numpy(), 0
        for rank in range(group.size):
            for part in self._coming.of(rank, turn) if rank != group.rank else ():
                part.put(given[at : at + part.size_bytes], self._memories[part.need])
                at += part.size_bytes

    def _others(self, files: Catalogue, needs: Sequence[Need]) -> list[Sorted]:
        """What each other rank wants of the blocks that this one reads."""
        group = self._group
        if group.size == 1:
            return []
        asked = [sorted(self._coming.read_by(rank)) for rank in range(group.size)]
        asked[group.rank] = []
        rows = [needs[number].to_row(files.width) for one in asked for number in one]
        counts = [len(one) for one in asked]
        theirs = group.alltoall(torch.tensor(counts)).tolist()
        sent = torch.tensor(rows, dtype=torch.int64).view(-1, files.width)
        told = torch.split(group.alltoall(sent, counts), theirs)
        read = [block for blocks in self._blocks.values() for block in blocks]
        span = range(min(read, default=0), max(read, default=-1) + 1)
        every = [[files.need(row) for row in part.tolist()] for part in told]
        return [Sorted(files.parts(one, span), self._rounds) for one in every]
