"""Collectives over GPU windows, cut into pieces: what a rank does between the meetings.

Where every rank's tensor lies in its window there is one piece, the whole. Where one does not, its
rank copies part by part through a slot, and all ranks go by pieces together:

    segments of 5, step 2     [0 1 2 3 4 | 5 6 7 8 9]
    slot, pieces 0, 1, 2      [0 1 | 5 6]   [2 3 | 7 8]   [4 . | 9 .]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from mpmp.comm.buffer import load
from mpmp.comm.reductions import Reduction
from mpmp.comm.spec import Spec

if TYPE_CHECKING:
    from mpmp.comm.device_window import DeviceWindows

SLOT_BYTES = 64 << 20
"""Longest piece of a tensor that is not in the pool."""

GRAIN = 64
"""Parts begin at multiples of so many elements, so that the kernel's loads are wide."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Shown:
    """What a rank shows the others: the address here of its tensor or, in pieces, of its slot."""

    address: int
    in_slot: bool


class Pieces:
    """Segments of the whole, and which part of each is a piece's."""

    def __init__(self, segments: list[Span], most_in_slot: int) -> None:
        self.segments = segments
        self._longest = max(high - low for low, high in segments)
        grains = min(-(-self._longest // GRAIN), most_in_slot // GRAIN)
        self.step = max(1, grains) * GRAIN

    def count(self, shown: list[Shown]) -> int:
        """How many pieces there are, now that all have said where their tensors lie."""
        if any(one.in_slot for one in shown):
            return max(1, -(-self._longest // self.step))
        self.step = self._longest
        return 1

    def parts(self, piece: int) -> list[Span]:
        first, last = piece * self.step, (piece + 1) * self.step
        return [(min(low + first, high), min(low + last, high)) for low, high in self.segments]


class Sum:
    """Allreduce and reduce-scatter: a rank sums its segment over all windows.

    An allreduce works in place, in the result where that is in the pool, else in a slot. A
    reduce-scatter leaves the windows as they are and writes to the rank's own result.
    """

    def __init__(
        self,
        windows: DeviceWindows,
        spec: Spec,
        reduction: Reduction,
        x: Tensor,
        at: int,
        result: Tensor,
        start: int,
    ) -> None:
        size, self._rank = windows.comm.size, windows.comm.rank
        self._everywhere = spec.collective == "allreduce"
        self._card, self._result, self._start = windows.card, result, start
        self._divide = float(size) if reduction.averages else 1.0
        total = spec.bounds[-1]
        segments = even(total, size) if self._everywhere else by_rank(spec.bounds, size)
        self.pieces = Pieces(segments, SLOT_BYTES // x.itemsize // size)
        if self._everywhere and windows.pool.place(result) is not None:
            load(result, x)
            x = result
        self._x = self.home = x
        self.slot: Tensor | None = None
        if windows.pool.place(x) is None:
            self.home = self.slot = windows.slot(self.pieces.step * size, x.dtype)

    def fill(self, piece: int) -> None:
        if self.slot is not None:
            for peer, (low, high) in enumerate(self.pieces.parts(piece)):
                self._in_slot(peer, high - low).copy_(self._x[low:high])

    def work(self, piece: int, shown: list[Shown]) -> None:
        low, high = self.pieces.parts(piece)[self._rank]
        item, in_slot = self._x.itemsize, self._rank * self.pieces.step
        sources = [one.address + (in_slot if one.in_slot else low) * item for one in shown]
        own = self._result.data_ptr() + (low - self._start) * item
        targets = sources if self._everywhere else [own]
        if low < high:
            self._card.sum_publish(sources, targets, high - low, self._x.dtype, self._divide)

    def take_out(self, piece: int) -> None:
        if self.slot is not None and self._everywhere:
            for peer, (low, high) in enumerate(self.pieces.parts(piece)):
                self._result[low:high].copy_(self._in_slot(peer, high - low))

    def _in_slot(self, peer: int, length: int) -> Tensor:
        assert self.slot is not None
        first = peer * self.pieces.step
        return self.slot[first : first + length]


class Copy:
    """Allgather and broadcast: a rank copies what the others own out of their windows."""

    def __init__(
        self,
        windows: DeviceWindows,
        spec: Spec,
        reduction: Reduction,
        x: Tensor,
        at: int,
        result: Tensor,
        start: int,
    ) -> None:
        size, self._rank = windows.comm.size, windows.comm.rank
        self._card, self._x, self._at = windows.card, x, at
        self._result, self._start = result, start
        if spec.collective == "allgather":
            segments = by_rank(spec.bounds, size)
        else:
            root, total = dict(spec.facts)["root"], spec.bounds[-1]
            segments = [(0, total) if rank == root else (0, 0) for rank in range(size)]
        self.pieces = Pieces(segments, SLOT_BYTES // x.itemsize)
        self.home: Tensor | None = None
        self.slot: Tensor | None = None
        low, high = segments[self._rank]
        if low < high:
            self.home = x
            if windows.pool.place(x) is None:
                self.home = self.slot = windows.slot(self.pieces.step, x.dtype)

    def fill(self, piece: int) -> None:
        if self.slot is not None:
            low, high = self.pieces.parts(piece)[self._rank]
            self.slot[: high - low].copy_(self._x[low - self._at : high - self._at])

    def work(self, piece: int, shown: list[Shown]) -> None:
        item = self._x.itemsize
        owners = zip(shown, self.pieces.segments, self.pieces.parts(piece), strict=True)
        for rank, (one, (first, _), (low, high)) in enumerate(owners):
            source = one.address + (0 if one.in_slot else (low - first) * item)
            if rank == self._rank:
                source = self._x.data_ptr() + (low - self._at) * item
            target = self._result.data_ptr() + (low - self._start) * item
            if low < high and source != target:
                self._card.copy(target, source, (high - low) * item)

    def take_out(self, piece: int) -> None:
        """Everything is in the result already."""


def even(length: int, size: int) -> list[Span]:
    """As equal segments as beginnings at multiples of the grain allow."""
    step = -(-length // (size * GRAIN)) * GRAIN
    return [(min(rank * step, length), min((rank + 1) * step, length)) for rank in range(size)]


def by_rank(bounds: tuple[int, ...], size: int) -> list[Span]:
    """The ranks' segments, of which a program may have cut each into several chunks."""
    return list(pairwise(bounds[:: (len(bounds) - 1) // size]))
