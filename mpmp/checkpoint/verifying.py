"""A checkpoint read to its last byte and held against its hashes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpmp.checkpoint.blocks import open_saved, read_block
from mpmp.checkpoint.chosen import choose
from mpmp.checkpoint.manifest import FILE, Manifest
from mpmp.comm.agreement import reason
from mpmp.errors import CheckpointError

_CLEAR = "\r\x1b[K"
"""Begins the line of a terminal anew."""


@dataclass(frozen=True)
class Verify:
    """Read all files of a checkpoint, or of every one of a run, and compare their hashes.

    Ends with 0 where all is as it was saved, else with 78 and the file, the block and its tensors.
    """

    folder: str = ""
    """Folder of a run, or of one step."""


def verify(asked: Verify) -> None:
    """Print a line for each checkpoint; CheckpointError that names the first damage."""
    chosen = choose(asked.folder)
    faults: list[str] = []
    for name, found in chosen.steps.items():
        if isinstance(found, str):
            wrong, words = [f"{chosen.run / name} {found}"], "damaged"
        else:
            shown = _Progress(name, sum(one.size_bytes for one in found.files.values()))
            path = chosen.run / name
            wrong = [f"{path}/{one}" for one in damages(path, found, shown)]
            words = f"damaged, {len(wrong)} of its files" if wrong else "good"
            words += f"; {shown.said()}"
        print(f"{_CLEAR if sys.stdout.isatty() else ''}{name}: {words}", flush=True)
        faults += wrong
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(f"{faults[0]}{more}")


def damages(step: Path, found: Manifest, told: Callable[[int], None]) -> Iterator[str]:
    """A sentence for each file of a step that is not as it was saved; ``told`` of bytes read."""
    for number, (name, expected) in enumerate(sorted(found.files.items())):
        block: int | None = None
        try:
            with open_saved(step / name, expected) as file:
                for block in range(expected.num_blocks):
                    told(len(read_block(file, expected, block)))
        except CheckpointError as error:
            where = _tensors_in(found, number, expected.bounds(block)) if block is not None else ""
            yield f"{name} {error}{where}"
        except OSError as error:
            yield f"{name} cannot be read: {reason(error, name)}"
    for name in sorted(set(os.listdir(step)) - {*found.files, FILE}):
        yield f"{name} is no file of this checkpoint: its manifest does not name it"


def _tensors_in(found: Manifest, file: int, block: tuple[int, int]) -> str:
    """The tensors that have elements in bytes [start, stop) of a file, in words."""
    start, stop = block
    names = [
        key
        for key, one in found.tensors.items()
        for piece in one.pieces
        if piece.file == file
        and piece.offset < stop
        and start < piece.offset + piece.extent.size * one.dtype.itemsize
    ]
    if not names:
        return "; it holds the header"
    return f"; it holds {names[0]}" + (
        f" and {len(names) - 1} more pieces of tensors" if names[1:] else ""
    )


class _Progress:
    """Bytes read so far: on a terminal one line that is rewritten, else nothing until the end."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._read = name, total, 0
        self._began = self._shown = time.perf_counter()
        self._terminal = sys.stdout.isatty()

    def __call__(self, num_bytes: int) -> None:
        self._read += num_bytes
        now = time.perf_counter()
        if self._terminal and now - self._shown > 0.1:
            self._shown = now
            part = self._read / self._total
            print(f"{_CLEAR}{self._name}: {part:.0%}, {self.said()}", end="\r", flush=True)

    def said(self) -> str:
        rate = self._read / max(time.perf_counter() - self._began, 1e-9)
        return (
            f"{self._read / 1e6:,.2f} of {self._total / 1e6:,.2f} MB read at {rate / 1e6:,.0f} MB/s"
        )
