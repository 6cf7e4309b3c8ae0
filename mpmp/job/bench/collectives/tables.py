"""What a person reads of the rows: a table a collective, the choice by size, model and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpmp.job.bench.collectives.bound import Bound
from mpmp.job.bench.collectives.rows import Row
from mpmp.job.bench.collectives.settings import AUTO, BASELINES, size_name
from mpmp.job.report import table


def figures(rows: Sequence[Row]) -> str:
    """Rows of one collective; ``x native`` is the library's time over this contender's."""
    baselines = [name for name in BASELINES if any(row.algorithm == name for row in rows)]
    head = ["bytes", "algorithm", "time us", "algbw GB/s", "busbw GB/s"]
    head += [f"x {name}" for name in baselines]
    times = {(row.bytes, row.algorithm): row.time_us for row in rows}
    lines = []
    longest = max(len(row.algorithm) for row in rows)
    for at, row in enumerate(rows):
        is_first = at == 0 or rows[at - 1].bytes != row.bytes
        name = row.algorithm.ljust(longest) + (f" WRONG {row.wrong}" if row.wrong else "")
        bandwidths = [f"{row.algbw_GBps:.3f}", f"{row.busbw_GBps:.3f}"]
        against = [_ratio(times.get((row.bytes, one)), row.time_us) for one in baselines]
        lines.append(
            [size_name(row.bytes) if is_first else "", name, f"{row.time_us:,.1f}", *bandwidths]
            + against
        )
    return table(head, lines)


def _ratio(theirs_us: float | None, ours_us: float) -> str:
    return "-" if theirs_us is None else f"{theirs_us / ours_us:.2f}"


def choices(rows: Sequence[Row], chosen: Mapping[tuple[str, int], str]) -> str:
    """Which algorithm ``auto`` took, and the fastest of those measured beside it."""
    lines = []
    for (collective, nbytes), name in chosen.items():
        ours = [row for row in _at(rows, collective, nbytes) if row.algorithm not in BASELINES]
        auto = next(row for row in ours if row.algorithm == AUTO)
        named = [row for row in ours if row.algorithm != AUTO and not row.wrong]
        fastest = min(named, key=lambda row: row.time_us, default=None)
        best = ["-", "-"] if fastest is None else [fastest.algorithm, f"{fastest.time_us:,.1f}"]
        lines.append([collective, size_name(nbytes), name, f"{auto.time_us:,.1f}", *best])
    head = ["collective", "bytes", "auto took", "auto us", "fastest", "fastest us"]
    return table(head, lines)


def _at(rows: Sequence[Row], collective: str, nbytes: int) -> list[Row]:
    return [row for row in rows if row.collective == collective and row.bytes == nbytes]


def predictions(pairs: Sequence[tuple[Row, float]]) -> str:
    """Rows beside the seconds that the fitted links simulate for them."""
    lines = [
        [
            row.collective,
            row.algorithm,
            size_name(row.bytes),
            f"{row.time_us:,.1f}",
            f"{seconds * 1e6:,.1f}",
            f"{100 * (seconds * 1e6 / row.time_us - 1):+.0f} %",
        ]
        for row, seconds in pairs
    ]
    head = [
        "collective",
        "algorithm",
        "bytes",
        "measured us",
        "simulated us",
        "simulated - measured",
    ]
    return table(head, lines)


def shares(bound: Bound, rows: Sequence[Row]) -> str:
    """What memory allows, and how near to it each allreduce of the same length comes."""
    lines = [
        [row.algorithm, f"{row.time_us:,.1f}", f"{100 * bound.share(row.time_us / 1e6):.0f} %"]
        for row in _at(rows, "allreduce", bound.nbytes)
    ]
    return f"{bound}\n" + table(["allreduce", "time us", "of the bound"], lines)
