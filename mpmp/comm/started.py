"""Collectives that are bound to memory that stays, started, and waited for later."""

from __future__ import annotations

import torch
from torch import Tensor

from mpmp.comm.buffer import load
from mpmp.comm.executor import Executor
from mpmp.comm.plan import Spec
from mpmp.comm.progress import Handle, Progress


class PreparedAllreduce:
    """A sum over the group, bound to memory that stays; replayed by the progress thread."""

    def __init__(self, executor: Executor, progress: Progress, spec: Spec, x: Tensor) -> None:
        self._progress, self._x = progress, x
        staged = x.is_cuda and not executor.world.cuda_aware
        buffer = x
        if staged or spec.dtype != x.dtype:
            device = "cpu" if staged else x.device
            buffer = torch.empty(x.numel(), dtype=spec.dtype, device=device, pin_memory=staged)
        self._operation = executor.bind(spec, buffer, prepared=not buffer.is_cuda)
        # A stream of its own: on the common one the sum would wait for all of backward. Entering
        # it also makes its GPU the progress thread's; a new thread begins with GPU 0.
        self._stream: torch.cuda.Stream | None = None
        if x.is_cuda:
            self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]

    def start(self) -> Handle:
        """Start the sum of what is in the memory now; wait for the handle before reading it."""
        if self._stream is None:
            return self._progress.start(self._carry_out)
        # A blocking event: the thread sleeps until the tensor was computed, and burns no core.
        produced = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self._x.device).record_event(produced)

        def work() -> None:
            with torch.cuda.stream(self._stream):
                produced.synchronize()
                self._carry_out()
                # Whoever waits for the handle may read the sum on any stream.
                torch.cuda.current_stream(self._x.device).synchronize()

        return self._progress.start(work)

    def _carry_out(self) -> None:
        load(self._operation.buffer, self._x)
        self._operation.run(background=True)
        load(self._x, self._operation.buffer)
