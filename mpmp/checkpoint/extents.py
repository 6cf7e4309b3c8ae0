"""Boxes and intervals of a tensor: what two pieces share, whichever way each of them was cut.

    tensor (3, 6), its box of rows 0 to 3 and columns 1 to 5, and elements [2, 9) of that box

        .  .  .  2  3  .      A layer cuts a box out of a tensor, and ZeRO an interval out of the
        .  4  5  6  7  .      row-major elements of a box: the tail of a row, whole rows, and the
        .  8  .  .  .  .      head of a row. In n dims these are at most 2n - 1 boxes.

Each of those boxes is a run of the interval's elements. Two pieces share what a box of the one has
in common with a box of the other; copying it is one strided assignment. No run is ever listed
element by element, so a column cut costs as little to describe as a row cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from numpy.typing import NDArray

Box = tuple[tuple[int, int], ...]
"""(start, stop) of each dim."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Elements [start, stop) of the row-major elements of a box."""

    box: Box
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def within(self, start: int, stop: int) -> Extent:
        """Elements [start, stop) of this extent's own, as far as it has them."""
        low, high = max(0, start), min(self.size, stop)
        return Extent(self.box, self.start + low, self.start + max(low, high))

    def in_bytes(self, itemsize: int) -> Extent:
        """The same of the tensor of bytes, which has one dim more."""
        return Extent((*self.box, (0, itemsize)), self.start * itemsize, self.stop * itemsize)


class Window(NamedTuple):
    """A box whose elements lie one after the other in an extent, the first of them at ``at``."""

    at: int
    box: Box


class Overlap(NamedTuple):
    """A box that two extents share, and the window of each that it lies in."""

    box: Box
    one: Window
    other: Window


def lengths(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """How many elements a box has."""
    return prod(lengths(box))


def whole(shape: tuple[int, ...]) -> Box:
    """The box of all of a tensor."""
    return tuple((0, length) for length in shape)


def windows(extent: Extent) -> Iterator[Window]:
    """The boxes that an extent consists of, in the order of its elements."""
    at = 0
    for box in _cut(extent.box, extent.start, extent.stop):
        yield Window(at, box)
        at += volume(box)


def overlaps(one: Extent, other: Extent) -> list[Overlap]:
    """All that two extents of a tensor share, as boxes that are disjoint and not empty."""
    if _common(one.box, other.box) is None:
        return []
    theirs = list(windows(other))
    return [
        Overlap(box, mine, their)
        for mine in windows(one)
        for their in theirs
        if (box := _common(mine.box, their.box)) is not None
    ]


def view(memory: NDArray[Any], window: Window, box: Box) -> NDArray[Any]:
    """The elements of a box that lies in a window, in the flat memory of the window's extent."""
    run = memory[window.at : window.at + volume(window.box)].reshape(lengths(window.box))
    places = zip(box, window.box, strict=True)
    # The ellipsis makes a view of the one element of no dims, too.
    index: Any = (..., *(slice(start - low, stop - low) for (start, stop), (low, _) in places))
    found: NDArray[Any] = run[index]
    return found


def _cut(box: Box, start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a box as boxes."""
    if start >= stop:
        return
    if not box:
        yield ()
        return
    (low, _), rest = box[0], box[1:]
    row = volume(rest)
    first, last = -(-start // row), stop // row
    if start % row:
        # The tail of a row, or its middle where the interval ends in the same row.
        before = first - 1
        for inner in _cut(rest, start - before * row, min(row, stop - before * row)):
            yield ((low + before, low + first), *inner)
    if first < last:
        yield ((low + first, low + last), *rest)
    if stop % row and first <= last:
        for inner in _cut(rest, 0, stop - last * row):
            yield ((low + last, low + last + 1), *inner)


def _common(one: Box, other: Box) -> Box | None:
    """The box that two boxes share; None where they share nothing."""
    found = []
    for (low, high), (start, stop) in zip(one, other, strict=True):
        if max(low, start) >= min(high, stop):
            return None
        found.append((max(low, start), min(high, stop)))
    return tuple(found)
