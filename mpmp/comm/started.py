"""Prepared collectives: bound to memory that stays, run now or started and waited for later."""

from __future__ import annotations

import time
import weakref
from typing import Protocol

import torch
from torch import Tensor

from mpmp.comm.buffer import load
from mpmp.comm.executor import Executor
from mpmp.comm.operation import Operation
from mpmp.comm.progress import Course, Handle, Progress
from mpmp.comm.reductions import Reduction
from mpmp.comm.spec import Spec
from mpmp.errors import TensorError


class Replay(Protocol):
    """A collective on memory that stays, to be carried out again and again."""

    def run(self) -> None: ...

    def start(self) -> Handle: ...

    def free(self) -> None: ...


class Prepared:
    """A collective in place on ``x``, one dim of ``spec.bounds[-1]`` elements that stay.

    ``input`` is the part of it that this rank contributes, ``output`` the part in which the result
    stands afterwards. ``run`` works in the calling thread, ``start`` leaves it to the progress
    thread; each has a communicator of its own, so that both may be under way at once.
    """

    def __init__(
        self,
        executors: tuple[Executor, Executor],
        progress: Progress,
        spec: Spec,
        reduction: Reduction,
        x: Tensor,
        places: tuple[tuple[int, int], tuple[int, int]],
        staged: bool,
    ) -> None:
        self._executors, self._progress, self.spec = executors, progress, spec
        self._reduction, self._x = reduction, x
        (at, end), (start, stop) = places
        self.input, self.output = x[at:end], x[start:stop]
        now = executors[0]
        self._plan = now.plan(spec)
        buffer = x
        if staged or spec.dtype != x.dtype:
            device = "cpu" if staged else x.device
            buffer = torch.empty(x.numel(), dtype=spec.dtype, device=device, pin_memory=staged)
        self._buffer, self._staged_input = buffer, buffer[at:end]
        self._result = buffer[start:stop]
        self._rank, self._size = now.comm.rank, now.comm.size
        self._operations: dict[Executor, Operation] = {}
        self._freed = False
        # A stream of its own: on the common one the sum would wait for all of backward. Entering
        # it also makes its GPU the progress thread's; a new thread begins with GPU 0.
        self._stream: torch.cuda.Stream | None = None
        if x.is_cuda:
            self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]

    def run(self) -> None:
        """Carry it out on what is in the memory now, in this thread."""
        now = self._executors[0]
        began = time.perf_counter()
        for wait in self._course(self._operation(now)):
            wait.wait()
        now.spent_s += time.perf_counter() - began

    def start(self) -> Handle:
        """Start it on what is in the memory now; wait for the handle before reading there."""
        operation = self._operation(self._executors[1])
        if self._stream is None:
            return self._progress.drive(self._course(operation), operation.lane)
        # A blocking event: the thread sleeps until the tensor was computed, and burns no core.
        produced = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self._x.device).record_event(produced)

        def work() -> None:
            with torch.cuda.stream(self._stream):
                produced.synchronize()
                for wait in self._course(operation):
                    wait.wait(background=True)
                # Whoever waits for the handle may read the sum on any stream.
                torch.cuda.current_stream(self._x.device).synchronize()

        return self._progress.start(work)

    def free(self) -> None:
        """Let the requests go; nothing of it may be under way."""
        self._freed = True
        for executor, operation in self._operations.items():
            executor.let_go(operation)
        self._operations.clear()

    def _operation(self, executor: Executor) -> Operation:
        """The operation of this executor, bound at first use; no other rank takes part in that."""
        if executor not in self._operations:
            if self._freed:
                raise TensorError(f"{self.spec} was freed; prepare it anew")
            operation = executor.bind(self._plan, self._buffer, self._reduction)
            self._operations[executor] = operation
            # Nothing under way holds this handle any more when it is collected.
            weakref.finalize(self, executor.let_go, operation).atexit = False
        return self._operations[executor]

    def _course(self, operation: Operation) -> Course:
        if self._buffer is not self._x:
            load(self._staged_input, self.input)
        if self.spec.collective == "alltoall":
            keep_own(self.spec, self._buffer, self._rank)
        yield from operation.course()
        self._reduction.finish(self._result, self._size)
        if self._buffer is not self._x:
            load(self.output, self._result)


def keep_own(spec: Spec, buffer: Tensor, rank: int) -> None:
    """Copy what a rank sends to itself from the input to the output of an all-to-all."""
    size = (len(spec.bounds) - 1) // 2
    first, to = spec.bounds[rank], spec.bounds[size + rank]
    length = spec.bounds[rank + 1] - first
    buffer[to : to + length].copy_(buffer[first : first + length])
