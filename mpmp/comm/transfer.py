"""Messages between two ranks of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from mpmp.comm.buffer import as_bytes, load, pieces
from mpmp.comm.executor import PROGRAM_TAG, Executor
from mpmp.comm.mpi import MPI
from mpmp.errors import TensorError


class Transfer:
    """A message under way. It keeps its memory alive; whoever started it waits for it."""

    def __init__(
        self, executor: Executor, flat: Tensor, peer: int, tag: int, *, sends: bool
    ) -> None:
        self._executor, self._flat, self._sends = executor, flat, sends
        self._peer = executor.ranks[peer]
        if not 0 <= tag < PROGRAM_TAG:
            raise TensorError(f"the tag of a message lies in [0, {PROGRAM_TAG}), {tag} does not")
        staged = flat.is_cuda and not executor.world.cuda_aware
        self._host = (
            torch.empty(flat.numel(), dtype=flat.dtype, pin_memory=True) if staged else flat
        )
        if sends:
            load(self._host, flat)
        if flat.is_cuda and not staged:
            torch.cuda.current_stream(flat.device).synchronize()
        post = executor.comm.Isend if sends else executor.comm.Irecv
        self._requests = [
            post(as_bytes(self._host[start:stop]), peer, tag)
            for start, stop in pieces(0, flat.numel(), flat.itemsize)
        ]
        self._peers = [(self._peer,)] * len(self._requests)
        self._statuses = [MPI.Status() for _ in self._requests]
        self._done = self._taken = False
        if executor.world.trace:
            what = "send" if sends else "receive"
            nbytes = flat.numel() * flat.itemsize
            executor.trace(f"{what} {nbytes} B, tag {tag}, {self._towards()}")

    def wait(self) -> None:
        """Return when the tensor may be used again; the wait counts as the group's."""
        if self._taken:
            return
        if not self._done:  # in world.wait, which says what a message that is too long means
            executor = self._executor
            executor.spent_s += executor.world.wait(
                self._requests, self._describe, peers=self._peers, statuses=self._statuses
            )
        self._taken = self._done = True
        if self._sends:
            return
        arrived, wanted = sum(one.count for one in self._statuses), self._flat.nbytes
        if arrived != wanted:
            raise TensorError(f"{self._describe()} has {arrived} B, this rank expects {wanted} B")
        load(self._flat, self._host)

    def done(self) -> bool:
        """Whether the message is through, without waiting."""
        if not self._done:  # a request that is through must not be asked again
            self._done = bool(MPI.Request.Testall(self._requests, self._statuses))
        return self._done

    def _describe(self) -> str:
        return f"a message {self._towards()} on group {self._executor.name}"

    def _towards(self) -> str:
        return f"{'to' if self._sends else 'from'} rank {self._peer}"
