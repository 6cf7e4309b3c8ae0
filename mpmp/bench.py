"""Time collectives against the MPI library's own: ``mpirun -n 2 python -m mpmp.bench``.

Every algorithm of every collective, and ``auto``, our choice among them, on float32 host tensors.
A figure is the median over repeats of the slowest rank's time; contenders take turns, so that
noise meets all of them. ``x native`` is the library's time over ours in the same run.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpmp import commands
from mpmp.errors import ConfigError, InputOutputError, VerifyError

if TYPE_CHECKING:
    from torch import Tensor

    from mpmp.comm.group import Group

BUS: dict[str, Callable[[int], float]] = {
    "allreduce": lambda p: 2 * (p - 1) / p,
    "reduce_scatter": lambda p: (p - 1) / p,
    "allgather": lambda p: (p - 1) / p,
    "broadcast": lambda p: 1.0,
}
"""busbw over algbw as nccl-tests define them; bytes are those of the whole array."""


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    smallest: int = 1024
    """Bytes of the shortest array; each next one is 16 times as long."""
    largest: int = 16 * 1024 * 1024
    """Bytes of the longest array."""
    repeats: int = 20
    """Timed calls of each contender."""
    csv: str | None = None
    """File that takes the rows, too."""

    def __post_init__(self) -> None:
        if not 4 <= self.smallest <= self.largest or self.repeats < 1:
            raise ConfigError("bench needs 4 <= smallest <= largest bytes and at least one repeat")


@dataclass(frozen=True)
class Row:
    """One contender's figure."""

    collective: str
    algorithm: str
    dtype: str
    ranks: int
    bytes: int
    time_us: float
    algbw_GBps: float
    busbw_GBps: float
    wrong: int


def main() -> None:
    """Parse the command line, then measure."""
    with commands.guarded():
        settings = commands.cli(Settings, "mpmp.bench", __doc__ or "", sys.argv[1:], Settings())
    with commands.guarded():
        from mpmp.comm import ending

    ending.run(lambda: bench(settings))


def bench(settings: Settings) -> None:
    """Measure, print a table a collective, and write the rows."""
    import torch

    from mpmp.comm.mesh import Mesh
    from mpmp.comm.world import start
    from mpmp.programs.collectives import COLLECTIVES

    world = start("cpu")
    mesh = Mesh.over(world)
    group, rows = mesh.everyone, []
    if world.rank == 0:
        print(f"{world.size} ranks, {world.library}, torch {torch.__version__}, float32")
    for collective, algorithms in COLLECTIVES.items():
        nbytes = settings.smallest
        while nbytes <= settings.largest:
            found = _measure(group, collective, ["native", "auto", *algorithms], nbytes, settings)
            rows += found
            if world.rank == 0:
                _show(found)
            nbytes *= 16
    if settings.csv is not None and world.rank == 0:
        _write(settings.csv, rows)
    if any(row.wrong for row in rows):
        raise VerifyError("a collective gave wrong numbers; the rows marked WRONG say which")


def _measure(
    group: Group, collective: str, contenders: list[str], nbytes: int, settings: Settings
) -> list[Row]:
    import torch

    whole = torch.arange(nbytes // 4, dtype=torch.float32) % 7
    calls = {name: _call(group, collective, name, whole) for name in contenders}
    expected = calls["native"]()
    wrong = {name: int((calls[name]() != expected).sum()) for name in contenders}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(settings.repeats):
        for name in contenders:
            group.barrier()
            began = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - began)
    slowest = group.allreduce(torch.tensor(list(times.values()), dtype=torch.float64), op="max")
    errors = group.allreduce(torch.tensor(list(wrong.values())))
    size = whole.numel() * 4
    rows = []
    for name, samples, bad in zip(contenders, slowest.tolist(), errors.tolist(), strict=True):
        seconds = statistics.median(samples)
        algbw = size / seconds / 1e9
        bus = BUS[collective](group.size) * algbw
        rows.append(
            Row(collective, name, "float32", group.size, size, seconds * 1e6, algbw, bus, bad)
        )
    return rows


def _call(group: Group, collective: str, name: str, whole: Tensor) -> Callable[[], Tensor]:
    from mpmp.comm.native import native

    own = whole
    if collective == "allgather":  # equal pieces, which the library's plain call needs
        own = whole[: whole.numel() // group.size].contiguous()
    if name == "native":
        return lambda: native(group, collective, own)
    algorithm = None if name == "auto" else name
    return lambda: getattr(group, collective)(own, algorithm=algorithm)


def _show(rows: list[Row]) -> None:
    native_us = rows[0].time_us
    for row in rows:
        print(
            f"{row.collective:<14} {row.bytes:>11,} B  {row.algorithm:<18} {row.time_us:>10,.1f} us"
            f"  busbw {row.busbw_GBps:>7.2f} GB/s  {native_us / row.time_us:>5.2f} x native"
            + (f"  WRONG {row.wrong}" if row.wrong else ""),
            flush=True,
        )


def _write(path: str, rows: list[Row]) -> None:
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in dataclasses.fields(Row)])
            writer.writerows(dataclasses.astuple(row) for row in rows)
    except OSError as error:
        raise InputOutputError(f"{path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    main()
