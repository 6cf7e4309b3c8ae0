"""What a person sees of a run, and the metrics file that is the truth.

On a terminal one line is rewritten in place; in a batch log every n-th step gets a plain line.
Only rank 0 shows anything.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mpmp.errors import InputOutputError
from mpmp.launcher import terminal_of_launcher


class Reporter:
    """Writes to standard output on rank 0, and nowhere on the others."""

    def __init__(self, speaks: bool, every: int, stream: TextIO | None = None) -> None:
        self._speaks, self._every = speaks, every
        self._stream = stream or sys.stdout
        self._terminal = terminal_of_launcher() if speaks and stream is None else None
        self._rewrites = False

    def line(self, text: str = "") -> None:
        """A line that stays."""
        if self._speaks:
            self._write(text)
            self._rewrites = False

    def progress(self, step: int, text: str, *, last: bool) -> None:
        """The state of things: rewritten on a terminal, now and then a line in a log."""
        if not self._speaks:
            return
        if self._terminal is not None:
            # Up and over the last one: Open MPI forwards whole lines only, so that a line which
            # merely returns to its beginning would not be seen before the end.
            over = "\x1b[1A\x1b[2K" if self._rewrites else ""
            self._write(over + text[: _columns(self._terminal) - 1])
            self._rewrites = True
        elif last or step % self._every == 0:
            self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def _columns(terminal: str) -> int:
    try:
        file = os.open(terminal, os.O_RDONLY | os.O_NOCTTY)
        try:
            return os.get_terminal_size(file).columns
        finally:
            os.close(file)
    except OSError:
        return 80


class Metrics:
    """``metrics.jsonl``: one JSON object a line, appended as things happen, on rank 0."""

    def __init__(self, path: Path, writes: bool, resume_from: int | None) -> None:
        self._path = path
        self._file: TextIO | None = None
        if not writes:
            return
        with self._named_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = []
            if resume_from is not None and path.exists():
                # Steps after the checkpoint will be taken again.
                lines = path.read_text().splitlines()
                kept = [line for line in lines if _step(line) <= resume_from and not _last(line)]
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            aside.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        if self._file is not None:
            with self._named_errors():
                self._file.write(json.dumps(values) + "\n")
                self._file.flush()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputOutputError(f"{self._path} cannot be written: {error.strerror}") from error


def _step(line: str) -> float:
    """The step a line tells of; a line that a crash cut short is of no step that counts."""
    try:
        return float(json.loads(line).get("step", -1))
    except (ValueError, AttributeError):
        return float("inf")


def _last(line: str) -> bool:
    """Whether a line stands at the end of a run, where it will be written again."""
    return '"event": "report"' in line


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they must be, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [head, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h10m"""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
