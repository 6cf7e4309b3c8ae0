"""What ranks need of which blocks: wanted tensors against stored pieces, cut at blocks.

    file     | block 0       | block 1       | block 2  |
    pieces     header | a [0, 20) | b rows 0 to 4  | ..         each a run of bytes of a tensor
    wanted              b columns 2 to 5                        two runs of block 1, one of block 2

All is counted in bytes: a tensor gets one dim more, of its element's bytes. So nothing needs to be
aligned, and an element may be cut by the border of two blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.checkpoint.contents import Contents, Piece
from mpmp.checkpoint.extents import Extent, Overlap, overlaps, view, volume


@dataclass(frozen=True, slots=True)
class Need:
    """What somebody wants of a piece: elements of a box, of the tensor of that number."""

    tensor: int
    piece: int
    extent: Extent

    def to_row(self, width: int) -> list[int]:
        """As numbers; a rank sends what it needs to those who read it."""
        bounds = [end for ends in self.extent.box for end in ends]
        row = [self.tensor, self.piece, self.extent.start, self.extent.stop, *bounds]
        return row + [0] * (width - len(row))


@dataclass(frozen=True, slots=True)
class Part:
    """What a need and a block share."""

    block: int
    """Among all blocks of all files."""
    need: int
    """Whose it is, by its place among the needs."""
    overlaps: tuple[Overlap, ...]
    offset: int
    """Where the piece's bytes in this block begin, in the block."""

    @property
    def size_bytes(self) -> int:
        return sum(volume(one.box) for one in self.overlaps)

    def take(self, block: NDArray[Any], out: NDArray[Any]) -> None:
        """Copy from the block's bytes, one box after the other."""
        at, run = 0, block[self.offset :]
        for one in self.overlaps:
            found = view(run, one.one, one.box)
            out[at : at + found.size].reshape(found.shape)[...] = found
            at += found.size

    def put(self, given: NDArray[Any], target: NDArray[Any]) -> None:
        """Copy what :meth:`take` gave into the memory of the needed extent."""
        at = 0
        for one in self.overlaps:
            place = view(target, one.other, one.box)
            place[...] = given[at : at + place.size].reshape(place.shape)
            at += place.size

    def pass_on(self, block: NDArray[Any], target: NDArray[Any]) -> None:
        """Both at once, where the block is read by who needs it."""
        run = block[self.offset :]
        for one in self.overlaps:
            view(target, one.other, one.box)[...] = view(run, one.one, one.box)


class Catalogue:
    """The tensors and blocks of some files by their numbers, the same on every rank."""

    def __init__(self, contents: Contents) -> None:
        self.files = contents.files
        self.keys = sorted(contents.tensors)
        self.tensors = [contents.tensors[key] for key in self.keys]
        self.number = {key: number for number, key in enumerate(self.keys)}
        counts = [file.fingerprint.num_blocks for file in self.files]
        self._first_block = [0, *accumulate(counts)]
        self.num_blocks = self._first_block[-1]
        dims = max((len(one.shape) for one in self.tensors), default=0)
        self.width = 4 + 2 * dims
        """Numbers of a need's row."""

    def place(self, block: int) -> tuple[int, int]:
        """The file of a block, and its number there."""
        file = int(np.searchsorted(self._first_block, block, side="right")) - 1
        return file, block - self._first_block[file]

    def block_bytes(self, block: int) -> int:
        file, number = self.place(block)
        start, stop = self.files[file].fingerprint.bounds(number)
        return stop - start

    def needs(self, key: str, wanted: Extent) -> Iterator[Need]:
        """The pieces that may have something of what is wanted of a tensor."""
        tensor = self.number[key]
        for number, piece in enumerate(self.tensors[tensor].pieces):
            if overlaps(piece.extent, wanted):
                yield Need(tensor, number, wanted)

    def need(self, row: Sequence[int]) -> Need:
        """What :meth:`Need.to_row` made numbers of."""
        tensor, piece, start, stop, *bounds = map(int, row)
        dims = len(self.tensors[tensor].shape)
        box = tuple(zip(bounds[: 2 * dims : 2], bounds[1 : 2 * dims : 2], strict=True))
        return Need(tensor, piece, Extent(box, start, stop))

    def parts(self, needs: Sequence[Need], blocks: range) -> list[Part]:
        """What some needs have in some blocks."""
        return [
            part for number, need in enumerate(needs) for part in self._parts(number, need, blocks)
        ]

    def _parts(self, number: int, need: Need, blocks: range) -> Iterator[Part]:
        stored = self.tensors[need.tensor]
        piece, itemsize = stored.pieces[need.piece], stored.dtype.itemsize
        has, wants = piece.extent.in_bytes(itemsize), need.extent.in_bytes(itemsize)
        if not has.size:
            return
        own = self._blocks_of(piece, has.size)
        for block in range(max(own.start, blocks.start), min(own.stop, blocks.stop)):
            start, stop = self.files[piece.file].fingerprint.bounds(
                block - self._first_block[piece.file]
            )
            inside = has.within(start - piece.offset, stop - piece.offset)
            if found := tuple(overlaps(inside, wants)):
                yield Part(block, number, found, max(0, piece.offset - start))

    def _blocks_of(self, piece: Piece, size: int) -> range:
        each, first = self.files[piece.file].fingerprint.block_bytes, self._first_block[piece.file]
        return range(first + piece.offset // each, first + -(-(piece.offset + size) // each))
