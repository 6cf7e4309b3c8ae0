"""The bench of checkpoints: what the disk can do, and what saving and loading make of it.

    write     every rank writes its share of the same bytes and fsyncs
    early     the same, the disk asked to begin after each write; the faster one is its speed
    save      the whole protocol at once, hashes and manifest included
    behind    the same in the background
    blocked   what of it keeps the steps from going on: the copy
    load      by ranks that each want a piece of every tensor, of what replicas have written

What was written is removed before the next kind: what that costs hangs on the file system, and
memory for pages that the kernel never had before is slow in a virtual machine.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mpmp import checkpoint
from mpmp.checkpoint import Held
from mpmp.checkpoint.blocks import begin_writing
from mpmp.checkpoint.extents import lengths
from mpmp.comm.agreement import on_first, together
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import start
from mpmp.job.bench.checkpoint.settings import Checkpoints
from mpmp.job.bench.csv_file import write_csv
from mpmp.job.report import Reporter, table
from mpmp.programs.partition import partition

_KINDS = ("weight", "exp_avg", "exp_avg_sq")
_COLUMNS = 1024
_WRITE_BYTES = 16 << 20


@dataclass(frozen=True)
class Row:
    """Median and least seconds of the slowest rank; ``ratio``, of medians, as the table says."""

    what: str
    median_s: float
    least_s: float
    mb_per_s: float
    ratio: float


def bench(settings: Checkpoints) -> None:
    """Measure in turns, print a table, and write the file that was asked for."""
    world = start("cpu", settings.comm.timeout_s)
    report = Reporter(world.rank == 0, every=1)
    mesh = Mesh.over(world, data=world.size, settings=settings.comm)
    folder = Path(settings.folder)
    with checkpoint.locked(folder, mesh):
        session = Session(settings, mesh, folder)
        try:
            for turn in range(settings.repeats + 1):
                session.turn()
                report.line(f"turn {turn}/{settings.repeats}: {session.said()}")
        finally:
            on_first(f"remove {folder}", lambda: _clear(folder), mesh)
    rows = session.rows()
    report.line("\n" + session.head() + "\n" + _shown(rows))
    if settings.csv is not None and world.rank == 0:
        write_csv(settings.csv, Row, rows)
    mesh.free()


class Session:
    """The state that is saved, and the times of each kind of turn."""

    def __init__(self, settings: Checkpoints, mesh: Mesh, folder: Path) -> None:
        self._mesh, self._folder, self._steps = mesh, folder, 0
        rows = max(1, settings.megabytes * 1_000_000 // (4 * 3 * 8 * _COLUMNS))
        self._tensors = {
            f"{kind}/layer{number}": torch.rand(rows, _COLUMNS)
            for kind in _KINDS
            for number in range(8)
        }
        self._held = [Held.whole(key, one) for key, one in self._tensors.items()]
        self.bytes = sum(one.nbytes for one in self._tensors.values())
        self._at_once = checkpoint.Saver(folder / "at_once", mesh, 2, background=False)
        self._background = checkpoint.Saver(folder / "background", mesh, 2, background=True)
        self._times: dict[str, list[float]] = {}
        self._blocked_s = 0.0
        self._read = 0.0

    def turn(self) -> None:
        """Each kind once."""
        self._time("write", lambda: self._write(early=False))
        self._time("early", lambda: self._write(early=True))
        self._time("save", lambda: self._save(self._at_once))
        self._time("behind", lambda: self._save(self._background))
        self._note("blocked", self._blocked_s)
        self._time("load", self._load, clear=False)

    def said(self) -> str:
        """The last time of each kind."""
        return ", ".join(f"{kind} {times[-1]:.3f} s" for kind, times in self._times.items())

    def rows(self) -> list[Row]:
        """What was found, the first turn left out."""
        took = {kind: statistics.median(times[1:]) for kind, times in self._times.items()}
        disk = min(took["write"], took["early"])
        ratios = {kind: disk / took[kind] for kind in ("write", "early", "save", "behind")}
        ratios["blocked"] = took["blocked"] / took["save"]
        ratios["load"] = self._read / self.bytes
        return [
            Row(kind, took[kind], min(times[1:]), self.bytes / took[kind] / 1e6, ratios[kind])
            for kind, times in self._times.items()
        ]

    def head(self) -> str:
        world = self._mesh.world
        return (
            f"{world.size} ranks on {world.host}, {world.threads} threads each, {world.library}; "
            f"{self.bytes / 1e6:,.0f} MB in {self._folder}"
        )

    def _time(self, kind: str, work: Callable[[], object], *, clear: bool = True) -> None:
        """Seconds from when the disk has nothing left to do."""
        if clear:
            on_first("remove what was saved", lambda: _clear(self._folder), self._mesh)
        on_first("have all on the disk", os.sync, self._mesh)
        self._mesh.everyone.barrier()
        began = time.perf_counter()
        work()
        self._note(kind, time.perf_counter() - began)

    def _note(self, kind: str, took_s: float) -> None:
        """Keep the time of the slowest rank."""
        took = torch.tensor([took_s], dtype=torch.float64)
        slowest = float(self._mesh.everyone.allreduce(took, op="max"))
        self._times.setdefault(kind, []).append(slowest)

    def _write(self, early: bool) -> None:
        """This rank's share of the bytes, as plainly as can be."""
        start, stop = partition(self.bytes // 4, self._mesh.everyone.size)[self._mesh.world.rank]
        together("write", lambda: self._write_share(4 * (stop - start), early), self._mesh)

    def _write_share(self, left: int, early: bool) -> None:
        kind, at = "early" if early else "plain", 0
        with open(self._folder / f"{kind}_{self._mesh.world.rank:05}", "xb") as file:
            for one in self._tensors.values():
                part = one.view(-1).view(torch.uint8).numpy().data[: left - at]
                for start in range(0, len(part), _WRITE_BYTES):
                    size = file.write(part[start : start + _WRITE_BYTES])
                    if early:
                        begin_writing(file.fileno(), at, size)
                    at += size
            file.flush()
            os.fsync(file.fileno())

    def _save(self, saver: checkpoint.Saver) -> None:
        self._steps += 1
        began = time.perf_counter()
        saver.begin(self._steps, self._held, {})
        self._blocked_s = time.perf_counter() - began
        saver.finish()

    def _load(self) -> None:
        """As ranks of a tensor axis do: rows of one half of the tensors, columns of the other."""
        group, parts = self._mesh.everyone, []
        for number, (key, one) in enumerate(self._tensors.items()):
            box = [(0, length) for length in one.shape]
            box[number % 2] = partition(one.shape[number % 2], group.size)[group.rank]
            shape = tuple(one.shape)
            parts.append(Held(key, shape, tuple(box), torch.empty(lengths(tuple(box)))))
        loaded = checkpoint.load(self._folder / "background", lambda _: parts, self._mesh)
        read = torch.tensor([loaded.read_bytes], dtype=torch.float64)
        self._read = float(group.allreduce(read))


def _clear(folder: Path) -> None:
    """Remove what the bench has made."""
    for name in ("at_once", "background"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for kind in ("plain", "early"):
        for path in folder.glob(f"{kind}_*"):
            path.unlink()


_MEANINGS = {
    "write": "of the disk's speed: plain writes and fsync",
    "early": "of the disk's speed: plain writes, each begun at once, and fsync",
    "save": "of the disk's speed",
    "blocked": "of a save's time the steps stand still",
    "behind": "of the disk's speed, in the background",
    "load": "bytes read over bytes needed, all ranks together",
}


def _shown(rows: list[Row]) -> str:
    head = ["", "median s", "least s", "MB/s", "ratio", "which is"]
    lines = [
        [
            row.what,
            f"{row.median_s:.3f}",
            f"{row.least_s:.3f}",
            f"{row.mb_per_s:,.0f}",
            f"{row.ratio:.2f}",
            _MEANINGS[row.what],
        ]
        for row in rows
    ]
    return table(head, lines)
