"""Progress: one thread that drives started operations while the rank computes.

MPI moves nothing by itself between two calls, so an operation that was merely started would wait
for its ``wait``. The thread calls MPI for it and naps in between (tests every 0.1 ms hide all of a
transfer that is shorter than the computation). Operations run one after the other in the order in
which they were started, which must be the same on all ranks of a group.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable


class Handle:
    """A started operation. Whoever started it waits for it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
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
        # The limit on waiting is the operation's own; short waits let signal handlers run.
        while not self._done.wait(0.5):
            pass
        if self._error is not None:
            raise self._error
        return time.perf_counter() - start


class Progress:
    """The thread and its queue; without a thread operations run when they are started."""

    def __init__(self, threaded: bool) -> None:
        self._queue: queue.SimpleQueue[Handle] = queue.SimpleQueue()
        self._threaded = threaded
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> Handle:
        handle = Handle(work)
        if not self._threaded:
            handle.carry_out()
            return handle
        if self._thread is None:
            self._thread = threading.Thread(target=self._drive, name="mpmp-progress", daemon=True)
            self._thread.start()
        self._queue.put(handle)
        return handle

    def _drive(self) -> None:
        while True:
            self._queue.get().carry_out()
