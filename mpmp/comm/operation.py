"""An operation: a plan bound to memory by prepared requests, and replayed.

All that does not change between two runs is made here once: requests, the views that are combined,
the bytes that are expected. A run starts requests, waits, combines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpmp.comm.buffer import as_bytes
from mpmp.comm.mpi import MPI
from mpmp.comm.plan import DEPTH, Exchange, Piece, Plan, Put, Wave
from mpmp.comm.progress import Course
from mpmp.comm.reductions import Reduction
from mpmp.comm.world import unfinished
from mpmp.errors import TensorError

if TYPE_CHECKING:
    from mpmp.comm.executor import Executor

PROGRAM_TAG = 32767
"""Tag of the messages of programs, the highest that every MPI has; Transfer keeps below it. Where
operations run side by side each of their lanes has a tag of its own, counted down from here."""


class Operation:
    """A plan bound to one buffer; ``run`` may be called again and again.

    Operations of one lane run one after another, so they may share tag and scratch.
    """

    def __init__(
        self, plan: Plan, buffer: Tensor, reduction: Reduction, executor: Executor, lane: int = 0
    ) -> None:
        self.plan, self.buffer, self.executor = plan, buffer, executor
        self.lane, self._tag = (executor, lane), PROGRAM_TAG - lane
        self._combine = reduction.combine
        self._scratch = executor.scratch(plan.scratch_length, buffer, lane)
        self._types: list[MPI.Datatype] = []
        self._rounds = [
            [_Bound(self, exchange, wave) for wave in exchange.waves] for exchange in plan.exchanges
        ]

    def run(self) -> None:
        """Carry the rounds out."""
        for wave in self.course():
            wave.wait()

    def course(self) -> Course:
        """The rounds, carried out by who goes on after each wave only when all of it is there."""
        self.executor.require_whole()
        try:
            for waves in self._rounds:
                self._settle()
                for wave in waves[:DEPTH]:
                    wave.start()
                for number, wave in enumerate(waves):
                    yield wave
                    wave.put()
                    if number + DEPTH < len(waves):
                        self._settle()
                        waves[number + DEPTH].start()
            self._settle()
        except BaseException:
            # Requests may be under way and will write: what they were bound to must stay.
            self.executor.broken.append(self)
            raise

    def free(self) -> None:
        """Give the prepared requests back to MPI; no run may be under way."""
        for waves in self._rounds:
            for wave in waves:
                for request in wave.requests:
                    request.Free()
        for datatype in self._types:
            datatype.Free()
        self._rounds, self._types = [], []

    def prepare(self, piece: Piece) -> MPI.Prequest:
        comm = self.executor.comm
        post = comm.Send_init if piece.sends else comm.Recv_init
        if piece.scratch is not None:
            memory = self._scratch[piece.scratch : piece.scratch + piece.length]
            return post(as_bytes(memory), piece.peer, self._tag)
        if len(piece.spans) == 1:
            start, stop = piece.spans[0]
            return post(as_bytes(self.buffer[start:stop]), piece.peer, self._tag)
        return post([as_bytes(self.buffer)[0], 1, self._scattered(piece)], piece.peer, self._tag)

    def put(self, put: Put) -> list[Callable[[], object]]:
        """The calls that put what arrived into the buffer."""
        own = self.buffer[put.start : put.stop]
        length = put.stop - put.start
        views = [own if at is None else self._scratch[at : at + length] for at in put.parts]
        if len(views) == 1:
            return [partial(own.copy_, views[0])]
        calls: list[Callable[[], object]] = []
        so_far, merged = views[0], put.parts[0] is None
        for at, view in zip(put.parts[1:], views[1:], strict=True):
            # The buffer's own elements are overwritten once they have had their turn.
            merged = merged or at is None
            out = own if merged else views[0]
            calls.append(partial(self._combine, so_far, view, out=out))
            so_far = out
        return calls

    def _scattered(self, piece: Piece) -> MPI.Datatype:
        item = self.buffer.itemsize
        lengths = [(stop - start) * item for start, stop in piece.spans]
        datatype = MPI.BYTE.Create_hindexed(lengths, [start * item for start, _ in piece.spans])
        self._types.append(datatype.Commit())
        return datatype

    def _settle(self) -> None:
        # MPI knows no streams: what is sent next must have been computed.
        if self.buffer.is_cuda:
            torch.cuda.current_stream(self.buffer.device).synchronize()


class _Bound:
    """A wave with its requests and all that a run of it needs."""

    __slots__ = ("_expected", "_operation", "_peers", "_pieces", "_puts", "_statuses", "describe",
                 "requests")  # fmt: skip

    def __init__(self, operation: Operation, exchange: Exchange, wave: Wave) -> None:
        self._operation, self._pieces = operation, wave.pieces
        self.requests = [operation.prepare(piece) for piece in wave.pieces]
        ranks, item = operation.executor.ranks, operation.buffer.itemsize
        self._peers = [(ranks[piece.peer],) for piece in wave.pieces]
        self._statuses = [MPI.Status() for _ in wave.pieces]
        self._expected = [
            (status, piece.length * item)
            for status, piece in zip(self._statuses, wave.pieces, strict=True)
            if not piece.sends
        ]
        self._puts = [call for put in wave.puts for call in operation.put(put)]
        self.describe = partial(_describe, operation, exchange, wave)

    def start(self) -> None:
        if self._operation.executor.world.trace:
            _trace(self.describe.args[0], self.describe.args[1].number, self._pieces)
        MPI.Prequest.Startall(self.requests)

    def arrived(self) -> bool:
        return self._operation.executor.world.test(self.requests, self.describe, self._statuses)

    def wait(self, *, background: bool = False) -> None:
        self._operation.executor.world.wait(
            self.requests,
            self.describe,
            peers=self._peers,
            statuses=self._statuses,
            background=background,
        )

    def missing(self) -> Iterator[int]:
        return unfinished(self.requests, self._peers)

    def put(self) -> None:
        """Put what has arrived into the buffer."""
        for status, expected in self._expected:
            # MPI takes a message that is too short without a word, and leaves old bytes behind.
            if status.count != expected:
                raise TensorError(
                    f"{self.describe()} sent {status.count} B where this rank expects "
                    f"{expected} B; all ranks must make the same calls with the same shapes"
                )
        for put in self._puts:
            put()


def _describe(operation: Operation, exchange: Exchange, wave: Wave) -> str:
    executor = operation.executor
    peers = sorted({executor.ranks[piece.peer] for piece in wave.pieces})
    return (
        f"rank{'s' * (len(peers) > 1)} {', '.join(map(str, peers))} in {operation.plan.title} "
        f"(round {exchange.number}) on group {executor.name}"
    )


def _trace(operation: Operation, number: int, pieces: tuple[Piece, ...]) -> None:
    executor = operation.executor
    for piece in pieces:
        what, towards = ("send", "to") if piece.sends else ("receive", "from")
        executor.trace(
            f"{operation.plan.title} round {number}: {what} "
            f"{piece.length * operation.buffer.itemsize} B {towards} {executor.ranks[piece.peer]}"
        )
