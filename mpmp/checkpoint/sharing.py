"""Who writes what: replicas hold the same elements, and each of them writes its share.

    tensor a   held by ranks 0 1 2 3    | a a a a a a b b |   elements held by the same ranks lie
    tensor b   held by ranks 0 1 2 3      0   1   2   3       side by side and are cut evenly
    tensor c   held by rank 2           | c |                 what nobody else has, rank 2 writes

All ranks say what they hold and work this out alike. Where the copies of a tensor were cut at
different places (ZeRO beside an uneven tensor axis) it is first cut at all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from mpmp.checkpoint.contents import Piece, Stored
from mpmp.checkpoint.extents import Box, Extent, lengths, volume
from mpmp.checkpoint.tensorfile import Entry, lay_out
from mpmp.errors import CheckpointError
from mpmp.programs.partition import partition

METADATA = {"content": "pieces of a checkpoint; its manifest says of what"}


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank has of a tensor, without its elements."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True)
class Share:
    """One rank's file: its header, and what of which tensor goes where in it."""

    header: bytes
    pieces: Sequence[tuple[Holding, Entry]]
    """What is written, in the order of the file."""

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(entry.size_bytes for _, entry in self.pieces)


def share_out(held: Sequence[Sequence[Holding]]) -> list[Share | None]:
    """The file of each rank, None for one that writes nothing; ``held`` is what each rank has."""
    by_holders: dict[tuple[int, ...], list[Holding]] = {}
    for one, holders in _segments(held):
        by_holders.setdefault(holders, []).append(one)
    written: list[dict[str, Holding]] = [{} for _ in held]
    for holders, segments in by_holders.items():
        total = sum(one.extent.size * one.dtype.itemsize for one in segments)
        cuts = partition(total, len(holders))
        at = 0
        for one in segments:
            size = one.dtype.itemsize
            for rank, (low, high) in zip(holders, cuts, strict=True):
                # Rounded to elements, each way alike on both sides of a cut.
                part = one.extent.within(-(-(low - at) // size), -(-(high - at) // size))
                if part.size:
                    piece = Holding(one.key, one.dtype, one.shape, part)
                    written[rank][name_of(piece)] = piece
            at += one.extent.size * size
    return [_share(one) if one else None for one in written]


def size_of(shares: Iterable[Share | None]) -> int:
    """Bytes of all shards."""
    return sum(one.size_bytes for one in shares if one is not None)


def stored(shares: Sequence[Share | None], held: Iterable[Holding]) -> dict[str, Stored]:
    """The tensors of a checkpoint by key, with their pieces; files are counted by the ranks."""
    kinds = {one.key: (one.dtype, one.shape) for one in held}
    pieces: dict[str, list[Piece]] = {key: [] for key in sorted(kinds)}
    for file, share in enumerate(one for one in shares if one is not None):
        for one, entry in share.pieces:
            extent = one.extent
            pieces[one.key].append(Piece(file, entry.offset, extent.box, extent.start, extent.stop))
    return {key: Stored(*kinds[key], tuple(found)) for key, found in pieces.items()}


def name_of(piece: Holding) -> str:
    """The name of a piece in its file: the key, the box and the interval, where not all."""
    extent, key = piece.extent, piece.key
    if any(bounds != (0, n) for bounds, n in zip(extent.box, piece.shape, strict=True)):
        key += "@" + ",".join(f"{start}:{stop}" for start, stop in extent.box)
    return key if _is_whole(extent) else f"{key}[{extent.start}:{extent.stop}]"


def _is_whole(extent: Extent) -> bool:
    return extent.size == volume(extent.box)


def _share(pieces: Mapping[str, Holding]) -> Share:
    shapes = {
        name: (one.dtype, lengths(one.extent.box) if _is_whole(one.extent) else (one.extent.size,))
        for name, one in pieces.items()
    }
    header, entries = lay_out(shapes, METADATA)
    return Share(header, [(pieces[entry.name], entry) for entry in entries])


def _segments(held: Sequence[Sequence[Holding]]) -> Iterator[tuple[Holding, tuple[int, ...]]]:
    """Every element that is held, once: in segments with the ranks that hold all of each."""
    boxes: dict[tuple[str, Box], list[tuple[int, Holding]]] = {}
    kinds: dict[str, Holding] = {}
    for rank, holdings in enumerate(held):
        for one in holdings:
            first = kinds.setdefault(one.key, one)
            if (one.dtype, one.shape) != (first.dtype, first.shape):
                raise CheckpointError(
                    f"{one.key} is {one.dtype} {one.shape} on rank {rank} and {first.dtype} "
                    f"{first.shape} on another one"
                )
            boxes.setdefault((one.key, one.extent.box), []).append((rank, one))
    for (key, box), found in sorted(boxes.items(), key=lambda item: item[0]):
        first = kinds[key]
        for start, stop, holders in _sweep(found):
            yield Holding(key, first.dtype, first.shape, Extent(box, start, stop)), holders


def _sweep(found: Sequence[tuple[int, Holding]]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Intervals between the ends of all intervals of a box, each with the ranks that hold it."""
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for rank, one in found:
        begins.setdefault(one.extent.start, []).append(rank)
        ends.setdefault(one.extent.stop, []).append(rank)
    holding: Counter[int] = Counter()
    for start, stop in pairwise(sorted({*begins, *ends})):
        holding.update(begins.get(start, ()))
        holding.subtract(ends.get(start, ()))
        holders = tuple(sorted(rank for rank, times in holding.items() if times > 0))
        if holders:
            yield start, stop, holders
        holding = +holding
