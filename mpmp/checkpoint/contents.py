"""What files hold of which tensors: made of a manifest, or of the headers of any safetensors files.

Readers know nothing else of a checkpoint, so files of other programs are read by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mpmp.checkpoint.blocks import Fingerprint
from mpmp.checkpoint.extents import Box, Extent


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of a box of a tensor, which lie at ``offset`` bytes in a file."""

    file: int
    offset: int
    box: Box
    start: int
    stop: int

    @property
    def extent(self) -> Extent:
        return Extent(self.box, self.start, self.stop)


@dataclass(frozen=True)
class Stored:
    """A global tensor, and the pieces that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class File:
    """A file and how long it is; with the hashes of its blocks where they are known."""

    path: Path
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Contents:
    """Files, and by key the tensors whose pieces they hold."""

    files: tuple[File, ...]
    tensors: Mapping[str, Stored]
