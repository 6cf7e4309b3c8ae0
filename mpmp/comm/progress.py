"""Progress: one thread that drives started operations while the rank computes.

    started   0  1  2  3  4  5
    lane 0    |--- 0 ---|-- 2 --|--- 4      LANES operations of a group are under way at once: while
    lane 1      |--- 1 ---|--- 3 ---|-- 5   one waits for a latency another one fills the link

MPI moves nothing by itself between two calls, so an operation that was merely started would wait
for its ``wait``. The thread carries it out, and while nothing arrives it asks MPI and naps in
between: half of what such a wait has usually taken, or a quarter of what this one has; between
0.1 ms and 1 ms, for some libraries take no more than 64 KiB from a connection each time they are
asked. What one operation is late by the other hides. Once somebody waits there is no computation
to spare, and naps stay short. The thread needs Python's lock for some microseconds each time; a
kernel of torch that runs meanwhile has let go of it.

Operations of one lane follow one another, in the order in which they were started, which must be
the same on all ranks of a group. Those of other groups do not wait for them: a sum that a layer
needs now passes the buckets of gradients that nobody needs before the end of the step. Work on a
GPU is the exception: it has no lane, goes alone, and nothing passes it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator
from typing import Protocol

LANES = 2
"""Operations of one group under way at once."""
SHORT_NAP_S, LONG_NAP_S = 100e-6, 1e-3


class Handle(Protocol):
    """A started operation. Whoever started it waits for it."""

    def wait(self) -> float: ...


class Wait(Protocol):
    """What an operation waits for before it goes on."""

    def arrived(self) -> bool:
        """Whether it is there; asked until it is, and no more."""
        ...

    def wait(self, *, background: bool = False) -> None:
        """Return when it is there."""
        ...

    def describe(self) -> str: ...

    def missing(self) -> Iterator[int]:
        """The ranks of the world that have yet to do something."""
        ...


Course = Generator[Wait, None, None]
"""An operation as it is carried out: it goes on when what it yields is there."""


class Task:
    """An operation under way, or on the way there. Without a lane nothing else is at its time."""

    def __init__(self, progress: Progress, course: Course, lane: Hashable) -> None:
        self._progress, self._course, self.lane = progress, course, lane
        self.waits_for: Wait | None = None
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def go_on(self) -> bool:
        """Whether it has come further, or to its end."""
        try:
            if self.waits_for is not None and not self.waits_for.arrived():
                return False
            self.waits_for = next(self._course, None)
        except BaseException as error:
            self.fail(error)
        if self.waits_for is None:
            self._done.set()
        return True

    def fail(self, error: BaseException) -> None:
        """End it with an error, which whoever waits for it will see."""
        try:
            self._course.throw(error)
        except BaseException as raised:
            self._error = raised
        self.waits_for = None
        self._done.set()

    def wait(self) -> float:
        """Wait until the operation is done; the seconds it took. Raises what it raised."""
        start = time.perf_counter()
        self._progress.until_done(self)
        if self._error is not None:
            raise self._error
        return time.perf_counter() - start


class Progress:
    """The queue of started operations and the thread that works it off.

    Where MPI may not be called by several threads, whoever waits works it off, in the same order:
    an operation that was started may need what this rank does before it waits. ``until`` is the
    world's loop of waiting.
    """

    def __init__(self, until: Callable[..., float], threaded: bool) -> None:
        self._until, self.threaded = until, threaded
        self._queue: deque[Task] = deque()
        self._under_way: list[Task] = []
        self._awaited: set[Task] = set()
        self._usual_s = 0.0
        """How long the thread has lately waited until something moved."""
        self._thread: threading.Thread | None = None
        self._bell = threading.Event()
        """Rung when there is something to do for a thread that has nothing."""
        self._stopping = False

    def start(self, work: Callable[[], None]) -> Task:
        """Carry something out in one go, while nothing else is under way."""

        def course() -> Course:
            work()
            yield from ()

        return self.drive(course(), None)

    def drive(self, course: Course, lane: Hashable) -> Task:
        """Carry out a course, beside others that are not in its lane."""
        task = Task(self, course, lane)
        self._queue.append(task)
        if self.threaded and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mpmp-progress", daemon=True)
            self._thread.start()
        self._bell.set()
        return task

    def until_done(self, task: Task) -> None:
        if not self.threaded:
            while not task.done:
                self._turn(nap=None)
        self._awaited.add(task)
        # The limit on waiting is the operation's own; short waits let signal handlers run.
        while not task._done.wait(0.5):
            pass
        self._awaited.discard(task)

    def stop(self) -> None:
        """End the thread once the queue is empty."""
        if self._thread is not None:
            self._stopping = True
            self._bell.set()
            self._thread.join()
            self._thread, self._stopping = None, False

    def _run(self) -> None:
        while True:
            if self._under_way or self._queue:
                self._turn(self._nap)
            elif self._stopping:
                return
            else:
                self._bell.wait()
                self._bell.clear()

    def _turn(self, nap: Callable[[float], float] | None) -> None:
        """Wait until something moves."""
        try:
            waited_s = self._until(self._moved, self._describe, self._missing, nap=nap)
            self._usual_s += (waited_s - self._usual_s) / 8
        except BaseException as error:
            for task in self._under_way:
                task.fail(error)
        self._under_way = [task for task in self._under_way if not task.done]

    def _moved(self) -> bool:
        """Begin what may begin and go on with the rest; whether there was anything to do."""
        moved = self._begin() if self._queue else False
        for task in self._under_way:
            moved |= not task.done and task.go_on()
        return moved

    def _begin(self) -> bool:
        """Begin the first of each free lane; what has none begins alone, and nothing passes it."""
        moved, busy = False, {task.lane for task in self._under_way}
        # Others append meanwhile: a copy and a removal are one step each under Python's lock.
        for task in list(self._queue):
            if None in busy or (task.lane is None and busy):
                break
            if task.lane not in busy:
                self._queue.remove(task)
                self._under_way.append(task)
                moved |= task.go_on()
            busy.add(task.lane)
        return moved

    def _nap(self, waited_s: float) -> float:
        return SHORT_NAP_S if self._awaited else growing(max(waited_s, 2 * self._usual_s))

    def _describe(self) -> str:
        # What somebody waits for, else the oldest, for which others may wait.
        awaited = [task for task in self._under_way if task in self._awaited]
        first = (awaited or self._under_way)[0].waits_for
        return "" if first is None else first.describe()

    def _missing(self) -> Iterator[int]:
        for task in self._under_way:
            if task.waits_for is not None:
                yield from task.waits_for.missing()


def growing(waited_s: float) -> float:
    """Seconds to nap for one that has waited so long, in the background."""
    return max(SHORT_NAP_S, min(waited_s / 4, LONG_NAP_S))
