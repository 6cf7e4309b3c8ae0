"""Progress: one thread that drives started operations while the rank computes.

MPI moves nothing by itself between two calls, so an operation that was merely started would wait
for its ``wait``. The thread carries it out, and while it waits for a message it asks MPI and naps
in between: 0.1 ms at first, then a quarter of what it has waited, 4 ms at most, so that a long wait
is prolonged by a quarter at the worst and costs the computation next to nothing. The thread needs
Python's lock for some microseconds each time; a kernel of torch that runs meanwhile has let go of
it. Operations run one after the other in the order in which they were started, which must be
the same on all ranks of a group.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol


class Handle(Protocol):
    """A started operation. Whoever started it waits for it."""

    def wait(self) -> float: ...


class Task:
    """An operation in the queue of the progress thread."""

    def __init__(self, work: Callable[[], None], drive: Callable[[], bool] | None) -> None:
        self._work, self._drive = work, drive
        self._done = threading.Event()
        self._error: BaseException | None = None

    def carry_out(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self) -> float:
        """Wait until the operation is done; the seconds it took. Raises what it raised."""
        start = time.perf_counter()
        while self._drive is not None and not self._done.is_set():
            self._drive()
        # The limit on waiting is the operation's own; short waits let signal handlers run.
        while not self._done.wait(0.5):
            pass
        if self._error is not None:
            raise self._error
        return time.perf_counter() - start


class Progress:
    """The queue of started operations and the thread that works it off.

    Where MPI may not be called by several threads, whoever waits works it off, in the same order:
    an operation that was started may need what this rank does before it waits.
    """

    def __init__(self, threaded: bool) -> None:
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threaded = threaded
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> Task:
        handle = Task(work, None if self._threaded else self._next)
        self._queue.put(handle)
        if self._threaded and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mpmp-progress", daemon=True)
            self._thread.start()
        return handle

    def stop(self) -> None:
        """End the thread once the queue is empty."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _next(self) -> bool:
        handle = self._queue.get()
        if handle is not None:
            handle.carry_out()
        return handle is not None

    def _run(self) -> None:
        while self._next():
            pass
