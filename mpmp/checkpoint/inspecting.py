"""What is in a checkpoint: its step, layout, model, files and tensors, from the manifest alone."""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

from mpmp.checkpoint import folder as run_folder
from mpmp.checkpoint import manifest
from mpmp.checkpoint.chosen import choose
from mpmp.checkpoint.contents import Stored
from mpmp.checkpoint.manifest import Manifest

_COLUMNS = 76
"""Of a line of words beside its name."""


@dataclass(frozen=True)
class Inspect:
    """Tell what a checkpoint holds; of a run also which steps there are.

    Only manifests are read: verify reads the tensors.
    """

    folder: str = ""
    """Folder of a run, or of one step."""
    tensors: bool = False
    """List every tensor with its shape, and the boxes it is kept in."""


def inspect(asked: Inspect) -> None:
    """Print tables; CheckpointError where there is no good manifest."""
    chosen = choose(asked.folder)
    if not chosen.one:
        print(f"{chosen.run}: {_counted(len(chosen.steps), 'checkpoint')}")
        rows = [_step_row(chosen.run / name, one) for name, one in chosen.steps.items()]
        print(_table(_STEPS, rows))
        for sentence in chosen.bad():
            print(sentence)
        print()
    path, found = chosen.newest()
    print(path)
    for name, words in _facts(path, found):
        lines = textwrap.wrap(words, _COLUMNS) or [""]
        for head, line in zip_longest([name], lines, fillvalue=""):
            print(f"    {head:16}  {line}")
    print(f"\n{_table(_KINDS, list(_kind_rows(found)))}")
    print(f"\n{_table(_FILES, [*_file_rows(found), _manifest_row(path)])}")
    if asked.tensors:
        print(f"\n{_table(_TENSORS, [_tensor_row(*one) for one in sorted(found.tensors.items())])}")


# --- a run ----------------------------------------------------------------------------------------

_STEPS = ("checkpoint", "saved", "layout", "files", "MB")


def _step_row(path: Path, found: Manifest | str) -> list[str]:
    if isinstance(found, str):
        return [path.name, "not readable", "", "", ""]
    size = sum(one.size_bytes for one in found.files.values())
    return [path.name, _saved(path), found.layout, str(len(found.files)), _mb(size)]


def _saved(path: Path) -> str:
    """When the manifest was written, by the file's own time."""
    seconds = os.lstat(path / manifest.FILE).st_mtime
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


# --- a step ---------------------------------------------------------------------------------------

_KINDS = ("kind", "tensors", "elements", "dtype", "MB")
_FILES = ("file", "bytes", "blocks", "tensors")
_TENSORS = ("tensor", "shape", "dtype", "pieces", "MB")


def _facts(path: Path, found: Manifest) -> Iterator[tuple[str, str]]:
    written = json.loads(run_folder.read_manifest(path)[0])
    yield "step", f"{found.step}, save number {found.serial} of the run"
    yield "saved", f"{_saved(path)} by mpmp {written['mpmp']}, format {written['format']}"
    yield "layout", found.layout
    config: dict[str, Any] = found.meta.get("config", {})
    for section in ("model", "data", "optimizer", "train"):
        said = {name: one for name, one in config.get(section, {}).items() if one is not None}
        if said:
            yield section, ", ".join(f"{name} {one}" for name, one in said.items())
    for name, value in found.meta.items():
        if name != "config":
            yield f"meta {name}", json.dumps(value)


def _kind_rows(found: Manifest) -> Iterator[list[str]]:
    """One row for the weights, and one for each state of the optimiser."""
    kinds: dict[tuple[str, str], list[Stored]] = {}
    for key, one in found.tensors.items():
        kinds.setdefault((key.partition("/")[0], _dtype(one)), []).append(one)
    for (kind, dtype), members in kinds.items():
        elements = sum(prod(one.shape) for one in members)
        size = sum(_bytes(one) for one in members)
        yield [kind, f"{len(members):,}", f"{elements:,}", dtype, _mb(size)]


def _file_rows(found: Manifest) -> Iterator[list[str]]:
    held = [0] * len(found.files)
    for one in found.tensors.values():
        for number in {piece.file for piece in one.pieces}:
            held[number] += 1
    for (name, print_), tensors in zip(sorted(found.files.items()), held, strict=True):
        yield [name, f"{print_.size_bytes:,}", f"{len(print_.blocks):,}", f"{tensors:,}"]


def _manifest_row(path: Path) -> list[str]:
    return [manifest.FILE, f"{os.lstat(path / manifest.FILE).st_size:,}", "", ""]


def _tensor_row(key: str, one: Stored) -> list[str]:
    shape = " x ".join(map(str, one.shape)) or "one number"
    return [key, shape, _dtype(one), str(len(one.pieces)), _mb(_bytes(one))]


def _bytes(one: Stored) -> int:
    return prod(one.shape) * one.dtype.itemsize


def _dtype(one: Stored) -> str:
    return str(one.dtype).removeprefix("torch.")


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; names to the left, numbers to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or not cell for cell in column[1:]) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [head, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(f"    {line}" for line in lines)
