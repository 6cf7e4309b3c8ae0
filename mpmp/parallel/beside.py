"""Movements over a network beside the products that they feed or that feed them.

    gather    |-- 0 --|-- 1 --|-- 2 --|                 what is there is multiplied while more is
    product           |- 0 -| |- 1 -| |- 2 -|           under way (Wang et al. 2023, section 3)

    product   |- 0 -|- 1 -|- 2 -|                       partial sums leave as soon as they are there
    sum             |-- 0 --|-- 1 --|-- 2 --|

Only where the group's messages move while its ranks compute (``Carrier.overlaps``). Everywhere else
the same calls move the whole at once, in the calling thread.

Shapes: B batch, T time, D or K features, N = B T rows; u is this rank's piece of T, b some of B, n
some of N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from mpmp.comm.group import Group
from mpmp.parallel.adjoints import all_pieces, own_piece_of_sum
from mpmp.programs.partition import partition

MOST_PIECES = 4
LEAST_BYTES = 256 * 1024
"""Of a piece: smaller ones take more of the processor and of latencies than they hide. What is
smaller as a whole moves at once."""


class Gathered:
    """The whole (B, T, D) of pieces (B, u, D), moved once it is started or asked for.

    Without ``sequence`` each rank has the whole, and nothing moves.
    """

    def __init__(self, own_BuD: Tensor, group: Group, length: int, sequence: bool) -> None:
        self._own, self._group, self._length = own_BuD, group, length
        self._whole = None if sequence and group.size > 1 else own_BuD
        self._pieces: list[Callable[[], Tensor]] = []

    def start(self) -> None:
        """Let it move beside what this rank does until it asks for it."""
        if self._whole is None and not self._pieces and _may_move(self._own, self._group):
            self._pieces = [self._started(*rows) for rows in self._cuts()]

    def pieces(self) -> Iterator[Tensor]:
        """Rows of B in their order, (b, T, D) at a time, as they arrive."""
        if len(self._cuts()) > 1:
            self.start()
        for piece in self._pieces or [self.whole]:
            yield piece()

    def whole(self) -> Tensor:
        """All rows, (B, T, D)."""
        if self._whole is None and self._pieces:
            self._whole, self._pieces = torch.cat([piece() for piece in self._pieces]), []
        elif self._whole is None:
            self._whole = all_pieces(self._own, self._group, self._length, 1).contiguous()
        return self._whole

    def _cuts(self) -> list[tuple[int, int]]:
        rows, _, features = self._own.shape
        return _cuts(rows, self._length * features * self._own.itemsize)

    def _started(self, first: int, end: int) -> Callable[[], Tensor]:
        own_ubD = self._own[first:end].transpose(0, 1)
        whole_TbD = own_ubD.new_empty(self._length, *own_ubD.shape[1:])
        cuts = partition(self._length, self._group.size)
        whole_TbD[slice(*cuts[self._group.rank])] = own_ubD
        done = _start(self._group, "allgather", whole_TbD, _lengths(cuts))

        def arrived() -> Tensor:
            done()
            return whole_TbD.transpose(0, 1)

        return cache(arrived)


def summed(
    partial_BTK: Tensor,
    compute: Callable[[slice, Tensor], object],
    group: Group,
    *,
    sequence: bool,
    ahead: bool = False,
) -> Callable[[], Tensor]:
    """What waits for the sum of the ranks' partial sums: (B, T, K), or own (B, u, K) of it.

    ``compute`` is called with rows of N and the part (n, K) of ``partial_BTK`` that it is to fill.
    ``ahead``: there is other work before the sum is asked for.
    """
    (B, T, K), rows_NK = partial_BTK.shape, partial_BTK.view(-1, partial_BTK.shape[-1])
    unit = T if sequence else 1  # what is cut over T moves by whole rows of B
    cuts = _cuts(B * T // max(1, unit), unit * K * partial_BTK.itemsize)
    if not _may_move(partial_BTK, group) or len(cuts) < (1 if ahead else 2):
        compute(slice(None), rows_NK)
        total = _sum_at_once(partial_BTK, group, sequence)
        return lambda: total
    start = _scattered if sequence else _summed
    under_way = []
    for first, end in cuts:
        rows = slice(first * unit, end * unit)
        compute(rows, rows_NK[rows])
        under_way.append(start(rows_NK[rows].view(-1, unit, K), group))

    def result() -> Tensor:
        found = [piece() for piece in under_way]
        return torch.cat(found) if sequence else partial_BTK

    return result


# --- inside ---------------------------------------------------------------------------------------


def _sum_at_once(partial_BTK: Tensor, group: Group, sequence: bool) -> Tensor:
    if group.size == 1:
        return partial_BTK
    if sequence:
        return own_piece_of_sum(partial_BTK, group, 1)
    return group.allreduce(partial_BTK, out=partial_BTK)


def _summed(part: Tensor, group: Group) -> Callable[[], Tensor]:
    done = _start(group, "allreduce", part)

    def result() -> Tensor:
        done()
        return part

    return result


def _scattered(part_bTK: Tensor, group: Group) -> Callable[[], Tensor]:
    cuts = partition(part_bTK.shape[1], group.size)
    part_TbK = part_bTK.transpose(0, 1).contiguous()
    done = _start(group, "reduce_scatter", part_TbK, _lengths(cuts))

    def result() -> Tensor:
        done()
        return part_TbK[slice(*cuts[group.rank])].transpose(0, 1)

    return result


def _start(
    group: Group, collective: str, x: Tensor, lengths: Sequence[int] | None = None
) -> Callable[[], None]:
    """A collective in place on the rows of ``x``, under way; what waits for it."""
    row = prod(x.shape[1:])
    each = None if lengths is None else [length * row for length in lengths]
    prepared = group.prepare(collective, x.view(-1), lengths=each)
    handle = prepared.start()

    def done() -> None:
        group.note_wait(handle.wait())
        prepared.free()

    return done


def _may_move(x: Tensor, group: Group) -> bool:
    """Whether something may move beside what is computed; all ranks of a group find the same.

    Tensors of inference mode may not be changed by another thread, which is not in it. Those of a
    GPU have one stream after another, in which a layer's sum would wait for buckets of gradients.
    """
    return group.overlaps and not (x.is_cuda or torch.is_inference_mode_enabled())


def _cuts(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Pieces of some rows that are worth the while; none of nothing or little."""
    number = min(MOST_PIECES, rows, rows * row_bytes // LEAST_BYTES)
    return partition(rows, number) if number else []


def _lengths(cuts: Sequence[tuple[int, int]]) -> list[int]:
    return [stop - start for start, stop in cuts]
