"""Continuations as a person sees them come: the first live, the others when it is their turn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import TextIO

from mpmp.job.generation_text import Continuation
from mpmp.launcher import terminal_of_launcher


class Screen:
    """Writes on one rank; prompts in their order, each followed by its text.

    Text is written as it becomes certain. Open MPI forwards whole lines only, so where a person
    watches it goes straight to the launcher's terminal.
    """

    def __init__(
        self,
        speaks: bool,
        prompts: Sequence[str],
        rows: Sequence[Continuation],
        stream: TextIO | None = None,
    ) -> None:
        self._speaks, self._prompts, self._rows = speaks, prompts, rows
        self._stream = stream or (_terminal() if speaks else None) or _output()
        self._at = 0
        self._began = False

    def said(self, _: Continuation) -> None:
        """Some row has a new token: write what is sure of the row whose turn it is."""
        while self._speaks and self._at < len(self._rows):
            row = self._rows[self._at]
            if not self._began:
                self._begin(row.number)
                self._began = True
            self._write(row.fresh())
            if not row.ended:
                return
            self._write("\n")
            self._at, self._began = self._at + 1, False

    def show(self, number: int, text: str) -> None:
        """A continuation that was made elsewhere."""
        if self._speaks:
            self._begin(number)
            self._write(text + "\n")

    def _begin(self, number: int) -> None:
        title = f"--- prompt {number + 1} of {len(self._prompts)}\n"
        self._write((title if len(self._prompts) > 1 else "") + self._prompts[number])

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()


def _output() -> TextIO:
    """This process's own; signs that its encoding has not are shown as question marks."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return sys.stdout


def _terminal() -> TextIO | None:
    """The launcher's terminal, if a person watches it on this host."""
    path = terminal_of_launcher()
    try:
        return None if path is None else open(path, "w", encoding="utf-8", errors="replace")
    except OSError:
        return None
