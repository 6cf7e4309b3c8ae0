"""What the figures say of the links, and what a simulation with these links says of the figures."""

from __future__ import annotations

from collections.abc import Sequence

from mpmp.job.bench.collectives.rows import Row
from mpmp.job.bench.collectives.settings import AUTO, BASELINES
from mpmp.programs import fit as fitting
from mpmp.programs.predict import predict


def named(rows: Sequence[Row]) -> list[Row]:
    """Rows of our algorithms by their own names."""
    return [row for row in rows if row.algorithm not in (AUTO, *BASELINES)]


def fit(rows: Sequence[Row], hosts: int) -> fitting.Fit | None:
    """The links as the rows show them; None where nothing was sent."""
    found = [
        fitting.Row(row.collective, row.algorithm, row.ranks, hosts, row.bytes, row.time_us / 1e6)
        for row in _moving(rows)
    ]
    return fitting.fit(found) if found else None


def predicted(rows: Sequence[Row], known: fitting.Fit, hosts: int) -> list[tuple[Row, float]]:
    """Every row that a model speaks of, with the seconds it simulates."""
    return [
        (row, predict(known, row.collective, row.algorithm, row.ranks, row.bytes, hosts))
        for row in _moving(rows)
    ]


def _moving(rows: Sequence[Row]) -> list[Row]:
    return [row for row in named(rows) if row.bytes and row.ranks > 1 and not row.wrong]
