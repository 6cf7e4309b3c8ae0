"""The manifest: what a checkpoint consists of, written last, so that where it is all else is.

    {"format": 2, "step": 12, "serial": 3, "layout": "dp2.pp1.tp2", "mpmp": "0.1.0", "meta": {..},
     "files": {"shard_00000.safetensors": {size, block hashes}, ..},
     "tensors": {"weight/head.weight": {"dtype": "F32", "shape": [512, 64], "pieces":
         [[file, offset, start, stop, [[0, 256], [0, 64]]], ..]}, ..},
     "sha256": hash of all the rest}

A piece is elements [start, stop) of a box of the global tensor, at a byte offset of a file, which
is counted by the order of the names. ``layout`` is for people: no reader needs to know it.
``serial`` counts the saves of a run folder: newest means saved last, also where a run was begun
anew in the folder of one that had come further.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from mpmp import __version__
from mpmp.checkpoint.blocks import Fingerprint
from mpmp.checkpoint.contents import Contents, File, Piece, Stored
from mpmp.checkpoint.extents import Box, volume
from mpmp.checkpoint.meta import Meta, require_types
from mpmp.checkpoint.tensorfile import DTYPES, NAMES, parse_object
from mpmp.errors import CheckpointError

FORMAT = 2
FILE = "manifest.json"
LONGEST_BYTES = 1 << 28
"""Room for the hashes of 3 TB; a longer manifest is taken for damage."""
_SHARD = re.compile(r"shard_[0-9]{5,9}\.safetensors")


class NewerFormatError(CheckpointError):
    """A sound checkpoint of a later version of mpmp; no reason to fall back to an older step."""


@dataclass(frozen=True)
class Manifest:
    """One checkpoint: its place in the run, its files by name, its tensors, the caller's ``meta``.

    A piece's ``file`` counts the names of ``files`` in their order.
    """

    step: int
    serial: int
    layout: str
    files: Mapping[str, Fingerprint]
    tensors: Mapping[str, Stored]
    meta: Mapping[str, Any]

    def contents(self, folder: Path) -> Contents:
        """What a reader needs to know, of a checkpoint that lies in a folder."""
        files = tuple(File(folder / name, self.files[name]) for name in sorted(self.files))
        return Contents(files, self.tensors)

    def to_text(self) -> str:
        content = {
            "format": FORMAT,
            "mpmp": __version__,
            "step": self.step,
            "serial": self.serial,
            "layout": self.layout,
            "files": {name: describe(one) for name, one in self.files.items()},
            "tensors": {key: _describe_tensor(one) for key, one in self.tensors.items()},
            "meta": self.meta,
        }
        return _canonical({**content, "sha256": _digest(content)})


def parse(text: str) -> Manifest:
    """The manifest a text holds; raises CheckpointError for any but the text that was written."""
    content = parse_object(text.encode(), "manifest")
    digest = content.pop("sha256", None)
    if content.get("format") == 1:
        raise CheckpointError(
            f"was saved by mpmp {content.get('mpmp')!r} in format 1, which knew one layout only; "
            f"this mpmp ({__version__}) reads format {FORMAT}"
        )
    # Equal to the canonical text: no byte can change, not even one that means nothing.
    try:
        as_saved = digest == _digest(content) and text == _canonical({**content, "sha256": digest})
    except RecursionError as error:
        raise CheckpointError(f"has a manifest that makes no sense ({error})") from None
    if not as_saved:
        raise CheckpointError("has a damaged manifest: its SHA-256 is not the one saved")
    version = content.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"has a manifest of format {version!r}")
    if version > FORMAT:
        raise NewerFormatError(
            f"was saved by mpmp {content.get('mpmp')!r} in format {version}, and this mpmp "
            f"({__version__}) reads up to {FORMAT}; update it or choose another --checkpoint.dir"
        )
    try:
        meta, layout = content["meta"], content["layout"]
        step, serial = _length(content["step"]), _length(content["serial"])
        if not isinstance(layout, str):
            raise ValueError("no layout")
        require_types("meta", meta, Meta)
        if not all(_SHARD.fullmatch(name) for name in content["files"]):
            raise ValueError(f"{sorted(content['files'])[:3]} are not names of shards")
        files = {name: fingerprint(one) for name, one in content["files"].items()}
        sizes = [files[name].size_bytes for name in sorted(files)]
        tensors = {key: _tensor(one, sizes) for key, one in content["tensors"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"has a manifest that makes no sense ({error!r:.200})") from None
    return Manifest(step, serial, layout, files, tensors, meta)


def describe(one: Fingerprint) -> dict[str, Any]:
    """A fingerprint in JSON's types."""
    return {
        "bytes": one.size_bytes,
        "block_bytes": one.block_bytes,
        "sha256": list(one.blocks),
    }


def fingerprint(said: dict[str, Any]) -> Fingerprint:
    """What :func:`describe` made; KeyError, TypeError or ValueError for anything else."""
    size, block_bytes, blocks = _length(said["bytes"]), _length(said["block_bytes"]), said["sha256"]
    if not 1 << 10 <= block_bytes <= 1 << 30 or not isinstance(blocks, list):
        raise ValueError(f"blocks of {block_bytes} bytes")
    if len(blocks) != -(-size // block_bytes) or not all(isinstance(one, str) for one in blocks):
        raise ValueError(f"{len(blocks)} blocks of {block_bytes} bytes in a file of {size}")
    return Fingerprint(size, block_bytes, tuple(blocks))


def _describe_tensor(one: Stored) -> dict[str, Any]:
    pieces = [[p.file, p.offset, p.start, p.stop, p.box] for p in one.pieces]
    return {"dtype": NAMES[one.dtype], "shape": one.shape, "pieces": pieces}


def _tensor(said: dict[str, Any], sizes: list[int]) -> Stored:
    """A tensor in files of some sizes, whose pieces are as many elements as it has."""
    dtype, shape = DTYPES[said["dtype"]], tuple(map(_length, said["shape"]))
    if prod(n or 1 for n in shape) >= 1 << 60:
        raise ValueError(f"a tensor of shape {shape}")
    pieces = tuple(_piece(one, dtype.itemsize, shape, sizes) for one in said["pieces"])
    if sum(one.stop - one.start for one in pieces) != prod(shape) or not _disjoint(pieces):
        raise ValueError(f"pieces that are not all of a tensor of shape {shape}, each once")
    return Stored(dtype, shape, pieces)


def _disjoint(pieces: Sequence[Piece]) -> bool:
    """Whether boxes are cells of one grid, and intervals of a box apart, so that none share any."""
    spans: dict[Box, list[tuple[int, int]]] = {}
    for one in pieces:
        spans.setdefault(one.box, []).append((one.start, one.stop))
    cuts: list[set[tuple[int, int]]] = [set(ranges) for ranges in zip(*spans, strict=True)]
    return all(
        stop <= start
        for one in (*cuts, *spans.values())
        for (_, stop), (start, _) in pairwise(sorted(one))
    )


def _piece(said: list[Any], itemsize: int, shape: tuple[int, ...], sizes: list[int]) -> Piece:
    *numbers, ranges = said
    file, offset, start, stop = map(_length, numbers)
    box = tuple((_length(low), _length(high)) for low, high in ranges)
    inside = all(low <= high <= n for (low, high), n in zip(box, shape, strict=True))
    if not inside or not start <= stop <= volume(box):
        raise ValueError(f"elements {start} to {stop} of {box} in a tensor of shape {shape}")
    if offset + (stop - start) * itemsize > sizes[file]:
        raise ValueError(f"a piece at {offset} in a file of {sizes[file]} bytes")
    return Piece(file, offset, box, start, stop)


def _length(said: Any) -> int:
    if type(said) is not int or not 0 <= said < 1 << 62:
        raise ValueError(f"{said!r:.50} is no length")
    return said


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()
