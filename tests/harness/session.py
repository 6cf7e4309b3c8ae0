"""The parent's side: one mpirun runs all selected rank tests of a size.

Importing torch costs seconds, so the ranks are started once a size, at its first test, and the
outcomes are read while they come. When a test takes the job down, it is reported as failed and
the tests after it get a new mpirun.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from harness.launch import Job
from harness.ranks import grouped, readable_stacks

_START_LIMIT_S = 180.0
"""Time the ranks have to import everything and reach their first test."""
_LOST_S = 1.0
"""Time mpirun has to end the job by itself when a rank is gone; MPICH's does not for code 0."""
_END_LIMIT_S = 60.0
"""Time the ranks have to end after their last test: on a busy machine 4 took more than 20 s."""
_MAX_STARTS = 12
"""Starts of a size; more mean that something is broken for all tests."""


Kind = Literal["passed", "skipped", "xfailed", "failed"]


class Outcome(NamedTuple):
    kind: Kind
    text: str = ""


@dataclass
class _Rank:
    """What one rank has reported since its start."""

    file: Path
    position: int = 0
    pid: int = 0
    started: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    texts: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def read(self) -> None:
        if not self.file.exists():
            return
        with self.file.open("rb") as lines:
            lines.seek(self.position)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self.position += len(line)
                self._take(json.loads(line))

    def _take(self, report: dict[str, str]) -> None:
        event, test = report["event"], report["test"]
        if event == "pid":
            self.pid = int(report["pid"])
        elif event == "start":
            self.started.add(test)
        elif event == "done":
            self.done.add(test)
        else:
            kind = "xfailed" if report.get("xfailed") else event
            self.texts.setdefault((test, kind), []).append(report["text"])

    def alive(self) -> bool:
        return self.pid == 0 or Path(f"/proc/{self.pid}").exists()

    def stacks(self) -> str:
        file = self.file.with_suffix(".stacks")
        return readable_stacks(file.read_text()) if file.exists() else ""


class RankSession:
    """All selected tests of one size, in order; ``pytest_args`` are given to every rank."""

    def __init__(
        self, n: int, tests: dict[str, float], pytest_args: Sequence[str], rootdir: Path
    ) -> None:
        self.n, self.tests, self.rootdir = n, tests, rootdir
        self.pytest_args = pytest_args
        self.job: Job | None = None
        self.ranks: list[_Rank] = []
        self.num_starts = 0
        self.broken = ""
        self._folder = tempfile.TemporaryDirectory(prefix="ranks.")

    def outcome(self, test: str) -> Outcome:
        """Wait for a test, starting the ranks where none run; never raises, never hangs."""
        while not self.broken:
            if self.job is None:
                self._start(test)
            verdict = self._wait(test)
            if verdict is not None:
                return verdict
            # The job ended before this test began, because of one before it.
            self.stop()
        return Outcome("failed", self.broken)

    def stop(self) -> None:
        if self.job is not None:
            self.job.__exit__()
            self.job = None

    def finish(self) -> list[str]:
        """After the last test: the ranks must end by themselves. What is wrong with their end."""
        if self.job is None:
            return []
        try:
            self.job.process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._ask_where_they_stand()
        run = self.job.finish(0)
        if run.rc == 0 and run.left_behind == 0:
            return []
        stands = grouped({i: text for i, rank in enumerate(self.ranks) if (text := rank.stacks())})
        head, _, output = run.text.partition("\n")
        return [
            f"after their last test the {self.n} ranks did not end well: {head}, "
            f"{run.left_behind} processes left behind\n{stands}\n{output[-3000:]}"
        ]

    def close(self) -> None:
        self.stop()
        self._folder.cleanup()

    def _start(self, first: str) -> None:
        self.num_starts += 1
        folder = Path(self._folder.name, str(self.num_starts))
        folder.mkdir()
        names = list(self.tests)
        rest = names[names.index(first) :]
        # A file of arguments, because there may be thousands.
        (folder / "args").write_text("\n".join([*self.pytest_args, *rest]))
        self.ranks = [_Rank(folder / f"rank_{rank}.jsonl") for rank in range(self.n)]
        self.job = Job(
            self.n,
            ["-m", "pytest", "--with-mpi", "--rank-reports", str(folder), f"@{folder / 'args'}"],
            cwd=self.rootdir,
            # One thread a rank: the sizes run here are larger than the number of cores.
            env={"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": None},
            limit_s=min(3600.0, _START_LIMIT_S + sum(self.tests[test] for test in rest)),
        )

    def _wait(self, test: str) -> Outcome | None:
        """This test's outcome; None when the job ended before any rank had begun it."""
        assert self.job is not None
        begun_s: float | None = None
        lost_s: float | None = None
        start_s = time.monotonic()
        while True:
            over = self.job.process.poll() is not None
            for rank in self.ranks:
                rank.read()
            if all(test in rank.done for rank in self.ranks):
                return self._verdict(test)
            now_s = time.monotonic()
            if begun_s is None and any(test in rank.started for rank in self.ranks):
                begun_s = now_s
            lost = [i for i, rank in enumerate(self.ranks) if not rank.alive()]
            if over:
                reason = f"mpirun ended with code {self.job.process.returncode}"
            elif lost and now_s - (lost_s := lost_s or now_s) > _LOST_S:
                reason = f"rank {', '.join(map(str, lost))} went away without a word"
            elif begun_s is not None and now_s - begun_s > self.tests[test] + 10:
                reason = f"no end after {now_s - begun_s:.0f} s"
            elif begun_s is None and now_s - start_s > _START_LIMIT_S:
                reason = f"the ranks did not come this far within {_START_LIMIT_S:.0f} s"
            else:
                time.sleep(0.005)
                continue
            self._bring_down(over)
            if begun_s is None and any(rank.started for rank in self.ranks):
                if self.num_starts < _MAX_STARTS:
                    return None
                reason = f"{reason}; not started again after {_MAX_STARTS} times"
            text = self._obituary(test, reason)
            if begun_s is None:
                self.broken = text
            self.stop()
            return Outcome("failed", text)

    def _bring_down(self, over: bool) -> None:
        """End the job; ranks that are still there say where they stand."""
        assert self.job is not None
        if not over:
            self._ask_where_they_stand()
        self.job.stop()
        for rank in self.ranks:
            rank.read()

    def _ask_where_they_stand(self) -> None:
        for rank in self.ranks:
            if rank.pid and rank.alive():
                os.kill(rank.pid, signal.SIGUSR2)
        time.sleep(0.3)

    def _verdict(self, test: str) -> Outcome:
        failed = self._failed(test)
        if failed:
            return Outcome("failed", f"{_headline(failed)}\n{grouped(failed)}")
        kinds: tuple[Kind, ...] = ("xfailed", "skipped")
        for kind in kinds:
            texts = self.ranks[0].texts.get((test, kind))
            if texts:
                return Outcome(kind, texts[0])
        return Outcome("passed")

    def _failed(self, test: str) -> dict[int, str]:
        texts = [rank.texts.get((test, "failed")) for rank in self.ranks]
        return {i: "\n".join(text) for i, text in enumerate(texts) if text}

    def _obituary(self, test: str, reason: str) -> str:
        """All that is known of a test that did not come to its end."""
        assert self.job is not None
        said = self._failed(test)
        if said:
            reason = f"{_headline(said)}\n{reason}"
        for i, rank in enumerate(self.ranks):
            if test in rank.done or i in said:
                continue
            stacks = rank.stacks()
            if stacks:
                said[i] = f"did not end; it was here when the job was stopped:\n{stacks}"
            else:
                said[i] = "left no report" if test in rank.started else "did not begin this test"
        ended = [text for rank in self.ranks for text in rank.texts.get((test, "ended"), [])]
        last_words = "\n".join(self.job.stderr.splitlines()[-25:])
        if not any(rank.started for rank in self.ranks):
            last_words = "\n".join(self.job.stdout.splitlines()[-40:]) + "\n" + last_words
        return "\n".join([reason, *ended[:1], grouped(said), "--- mpirun ---", last_words])


def _headline(failed: dict[int, str]) -> str:
    """What the first failed rank says, in one line."""
    rank, text = min(failed.items())
    error = re.search(r"^E +(.*)", text, re.M)
    return f"rank {rank}: {error[1] if error else text.splitlines()[0]}"
