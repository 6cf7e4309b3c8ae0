"""The files that a bench writes: rows, picture, tuning table. Rank 0 writes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mpmp.errors import ConfigError, InputOutputError
from mpmp.job.bench.collectives import picture
from mpmp.job.bench.collectives.models import named
from mpmp.job.bench.collectives.rows import Row
from mpmp.job.bench.collectives.settings import Collectives
from mpmp.job.bench.csv_file import write_csv
from mpmp.programs.fit import Fit
from mpmp.programs.tuning import Entry, Table, from_json


def require(settings: Collectives, library: str) -> None:
    """Refuse, before anything is measured, what could not be written afterwards."""
    if settings.png is not None:
        picture.require_matplotlib(settings.png)
    for path in (settings.csv, settings.png, settings.table):
        folder = Path(path or ".").resolve().parent
        if path is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise InputOutputError(f"{path} cannot be written: {folder} is no folder to write to")
        if path is not None and Path(path).is_dir():
            raise InputOutputError(f"{path} cannot be written: it is a folder")
    if settings.table is not None:
        _earlier(settings.table, library).merge(Table(library))


def write(
    settings: Collectives,
    rows: Sequence[Row],
    known: Fit | None,
    library: str,
    hosts: int,
    placement: str,
) -> list[str]:
    """Write what was asked for; a sentence a file says what it is."""
    said = []
    if settings.csv is not None:
        write_csv(settings.csv, Row, rows)
        said.append(f"{settings.csv}: {len(rows)} rows")
    if settings.png is not None:
        title = f"{rows[0].ranks} ranks, {library}, {settings.dtype}, {placement} memory"
        picture.draw(settings.png, rows, title)
        said.append(f"{settings.png}: time over bytes")
    if settings.table is not None:
        table = tuning_table(rows, known, library, hosts, placement)
        table = _earlier(settings.table, library).merge(table)
        _replace(settings.table, table.to_json())
        said.append(
            f"{settings.table}: {len(table.entries)} times to choose by; "
            f"use it with --comm.table {settings.table}"
        )
    return said


def tuning_table(
    rows: Sequence[Row], known: Fit | None, library: str, hosts: int, placement: str
) -> Table:
    """The right ones of our algorithms' rows, and the links fitted to them."""
    entries = tuple(
        Entry(row.collective, row.ranks, hosts, row.bytes, row.algorithm, row.time_us, placement)
        for row in named(rows)
        if not row.wrong
    )
    return Table(library, entries) if known is None else Table(library, entries, known.links)


def _earlier(path: str, library: str) -> Table:
    """The table that the file holds already: more ranks or another placement are added to it."""
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Table(library)
    except ConfigError as error:
        raise ConfigError(f"--table {path} is there already, and {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputOutputError(f"{path} cannot be read: {error}") from error


def _replace(path: str, text: str) -> None:
    """Write in one go: whoever reads meanwhile sees the old file or the new one."""
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        Path(aside).write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise InputOutputError(f"{path} cannot be written: {error.strerror}") from error
