"""On a rank: after each phase of a test all ranks vote, and a test that hangs ends the job.

The vote makes a test fail on all ranks or on none. It also keeps the ranks together: a fixture
that fails on one rank is known to all before the test's body starts to communicate.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pkgutil
import re
import signal
import socket
import sys
import threading
import time
from array import array
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import pytest

GRACE_S = 3.0
"""How long a rank that failed waits for the others to come to the vote."""
_PASSED, _SKIPPED, _FAILED = range(3)
_SOME_FAILED, _NONE_RAN = pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED
_DUMP = signal.SIGUSR2
_MACHINERY = ("/_pytest/", "/pluggy/", "/pytest/__main__", "runpy", "/threading.py", __file__)


class RankPlugin:
    """pytest's hooks on a rank; ``directory`` is where a parent process reads the outcomes."""

    def __init__(self, start: str, directory: Path | None) -> None:
        if start:
            pkgutil.resolve_name(start)()
        from mpi4py import MPI

        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
        self.mpi = MPI
        self.comm = MPI.COMM_WORLD.Dup()  # no other traffic is mistaken for votes
        self.rank, self.size = self.comm.rank, self.comm.size
        everyone = self.comm.allgather((socket.gethostname(), os.getpid()))
        self.pids_here = [pid for host, pid in everyone if host == socket.gethostname()]
        self.reports: IO[str] | None = None
        # pytest will redirect the standard streams; what is said at the end must get through.
        self.stderr: IO[str] = os.fdopen(os.dup(sys.__stderr__.fileno()), "w")  # type: ignore[union-attr]
        self.stacks = self.stderr
        if directory is not None:
            self.reports = (directory / f"rank_{self.rank}.jsonl").open("a")
            self.stacks = (directory / f"rank_{self.rank}.stacks").open("w")
        elif self.rank > 0:
            sys.stdout = open(os.devnull, "w")  # rank 0 shows the progress for all
        signal.signal(_DUMP, signal.SIG_IGN)  # for when Python has gone and MPI is still ending
        faulthandler.register(_DUMP, file=self.stacks, all_threads=True)
        self.test = ""
        self.ending = threading.Lock()
        self.write("pid", pid=os.getpid())

    def write(self, event: str, **facts: Any) -> None:
        if self.reports is not None:
            self.reports.write(json.dumps({"event": event, "test": self.test, **facts}) + "\n")
            self.reports.flush()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.test = item.nodeid
        limit_s = timeout_of(item)
        # Rank 0 ends a job in which all hang; another one does if rank 0 cannot. The timer of
        # faulthandler is the last one: it works even where a rank holds Python's lock.
        alarm = threading.Timer(limit_s + 0.5 * (self.rank > 0), self.end_job, [limit_s])
        alarm.daemon = True
        alarm.start()
        faulthandler.dump_traceback_later(limit_s + 5, exit=True, file=self.stacks)
        self.write("start")
        result = yield
        self.write("done")
        faulthandler.cancel_dump_traceback_later()
        alarm.cancel()
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        mine = {"passed": _PASSED, "skipped": _SKIPPED, "failed": _FAILED}[report.outcome]
        text = _text(report)
        if mine != _PASSED:
            self.write(report.outcome, text=text, xfailed=hasattr(report, "wasxfail"))
        votes = self.vote(mine, text)
        if any(vote != mine for vote in votes) and mine != _FAILED:
            vars(report).pop("wasxfail", None)
            report.outcome = "failed"
            if _FAILED in votes:
                report.longrepr = self.what_failed(votes, text)
            else:
                skipped = [rank for rank, vote in enumerate(votes) if vote == _SKIPPED]
                report.longrepr = f"skipped on ranks {skipped} of {self.size} only"
                self.write("failed", text=report.longrepr)
        elif _FAILED in votes:
            others = self.what_failed(votes, text)
            if self.rank == 0 and others:
                report.sections.append(("other ranks", others))
        return report

    def vote(self, mine: int, text: str) -> list[int]:
        """Every rank's outcome, on every rank. A rank that failed waits a little only."""
        sent = array("i", [0] * self.size)
        sent[self.rank] = mine
        votes = array("i", sent)
        request = self.comm.Iallreduce([sent, self.mpi.INT], [votes, self.mpi.INT], self.mpi.SUM)
        start_s = time.monotonic()
        while not request.Test():
            waited_s = time.monotonic() - start_s
            # One after the other, so that one ends the job and the rest are told by its end.
            if mine == _FAILED and waited_s > GRACE_S + 0.3 * self.rank:
                self.end_job(waited_s, text)
            time.sleep(0 if waited_s < 0.01 else 0.001)
        return list(votes)

    def what_failed(self, votes: list[int], text: str) -> str:
        """The tracebacks of the other ranks that failed, equal ones once."""
        said = self.comm.allgather(text)
        failed = {rank: said[rank] for rank, vote in enumerate(votes) if vote == _FAILED}
        failed.pop(self.rank, None)
        return grouped(failed)

    def end_job(self, waited_s: float, text: str = "") -> None:
        """Every rank writes where it stands; then the job is over. Never returns."""
        with self.ending:
            why = f"{self.test}: rank {self.rank} waited {waited_s:.0f} s for the other ranks"
            self.write("ended", text=why)
            if self.reports is None:
                print(f"\n{why}\n{text}", file=self.stderr, flush=True)
            for pid in self.pids_here:
                os.kill(pid, _DUMP)
            time.sleep(0.3)
            faulthandler.dump_traceback_later(5, exit=True, file=self.stacks)
            self.mpi.COMM_WORLD.Abort(1)
            os._exit(1)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # All ranks voted alike. One that ends with a code ends the others, so only rank 0 does,
        # and none where a parent reads the outcomes. Codes of pytest's own errors stay.
        spoken_for = self.reports is not None or self.rank > 0
        if spoken_for and session.exitstatus in (_SOME_FAILED, _NONE_RAN):
            session.exitstatus = pytest.ExitCode.OK


def timeout_of(item: pytest.Item) -> float:
    mark = item.get_closest_marker("ranks")
    return float(mark.kwargs.get("timeout", 60)) if mark is not None else 60.0


def grouped(texts: dict[int, str]) -> str:
    """``{0: a, 1: a, 2: b}`` as two paragraphs."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        ranks_of.setdefault(text, []).append(rank)
    return "\n".join(
        f"--- rank {', '.join(map(str, ranks))} ---\n{text}" for text, ranks in ranks_of.items()
    )


def readable_stacks(dumps: str) -> str:
    """The first dump of faulthandler for each thread, without the frames of the machinery."""
    shown: dict[str, str] = {}
    for block in re.split(r"(?m)^(?=(?:Current thread|Thread) 0x)", dumps):
        head, *frames = block.splitlines() or [""]
        thread = re.search("0x[0-9a-f]+", head)
        frames = [f for f in frames if f.strip() and not any(s in f for s in _MACHINERY)]
        if thread is not None and frames:
            shown.setdefault(thread[0], "\n".join(frames))
    return "\n\n".join(shown.values())


def _text(report: pytest.TestReport) -> str:
    if report.skipped:
        reason = getattr(report, "wasxfail", None)
        if reason is None:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        return str(reason)
    captured = [f"--- {title} ---\n{content}" for title, content in report.sections]
    return "\n".join([report.longreprtext, *captured]).rstrip()
