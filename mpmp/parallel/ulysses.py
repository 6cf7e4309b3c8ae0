"""Ulysses: ranks change from pieces of the sequence to heads for the time of attention.

    own positions, all heads --to_heads--> all positions, own heads
                                               attention
    own positions, all heads <--to_pieces--    of whole sequences

Two all-to-alls in each direction: q, k and v in one, the result in the other; each rank sends
(C-1)/C of what it holds (Jacobs et al. 2023, "DeepSpeed Ulysses"). Heads and positions may be cut
unevenly. A KV head that the query heads of several ranks read goes to all of them, so ``to_heads``
copies it and its adjoint ``to_pieces`` sums.

Shapes: B batch, T time, K head width; t is a rank's piece of T; h heads of a tensor rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpmp.comm.group import Group
from mpmp.parallel.attention import Heads, Rule, attention, places
from mpmp.parallel.attention_block import wide
from mpmp.programs.partition import partition
from mpmp.programs.sequence import Cut, Pieces, count


def ulysses_attention(
    q_BhtK: Tensor,
    k_BgtK: Tensor,
    v_BgtK: Tensor,
    group: Group,
    heads: Heads,
    cut: Cut,
    rule: Rule,
) -> Tensor:
    """Each own head's mixture of values at this rank's positions, (B, h, t, K).

    All tensors hold the positions ``cut[group.rank]`` and are of one dtype; all ranks of the group
    must call it, also those that get no head or have no positions.
    """
    cuts = partition(q_BhtK.shape[1], group.size)
    parts = [heads.part(*own) for own in cuts]
    kv = [_from(part.kv, heads.kv[0]) for part in parts]
    held = Exchange(group, cut, (q_BhtK.shape[1], *[k_BgtK.shape[1]] * 2), (cuts, kv, kv))
    q_BhTK, k_BgTK, v_BgTK = to_heads(held, q_BhtK, k_BgtK, v_BgtK)
    out_BhTK = attention(q_BhTK, k_BgTK, v_BgTK, parts[group.rank], rule)
    (out_BhtK,) = to_pieces(Exchange(group, cut, held.heads[:1], (cuts,)), out_BhTK)
    return out_BhtK


def _from(taken: tuple[int, int], first: int) -> tuple[int, int]:
    """A range counted from the first KV head that a tensor rank holds; (0, 0) for none."""
    return (taken[0] - first, taken[1] - first) if taken[0] < taken[1] else (0, 0)


def to_heads(exchange: Exchange, *pieces: Tensor) -> tuple[Tensor, ...]:
    """Own positions of all heads (B, h, t, K) -> all positions of own heads, of each tensor."""
    whole: tuple[Tensor, ...] = _ToHeads.apply(exchange, *pieces)  # type: ignore[no-untyped-call]
    return whole


def to_pieces(exchange: Exchange, *whole: Tensor) -> tuple[Tensor, ...]:
    """The adjoint: what several ranks have for the same head is summed."""
    pieces: tuple[Tensor, ...] = _ToPieces.apply(exchange, *whole)  # type: ignore[no-untyped-call]
    return pieces


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.to_heads(pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.to_pieces(grads)


class _ToPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *whole: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.to_pieces(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.to_heads(grads)


def _held(x_BhTK: Tensor, pieces: Pieces) -> Tensor:
    """What of all positions a rank holds."""
    if len(pieces) == 1:
        return x_BhTK[:, :, slice(*pieces[0])]
    return x_BhTK.index_select(2, places(pieces, x_BhTK.device))


@dataclass(frozen=True)
class Exchange:
    """What goes where: the heads that every rank takes of each tensor, at everybody's positions."""

    group: Group
    cut: Cut
    heads: tuple[int, ...]
    """Heads of each tensor."""
    taken: tuple[Sequence[tuple[int, int]], ...]
    """Of each tensor, the heads (start, stop) that each rank takes; they may overlap."""

    def to_heads(self, pieces: Sequence[Tensor]) -> tuple[Tensor, ...]:
        sent = [[x[:, start:stop] for x, (start, stop) in self._of(to, pieces)] for to in self._all]
        own = [stop - start for _, (start, stop) in self._of(self.group.rank, pieces)]
        arrived = self._alltoall(sent, [[(n, count(held)) for n in own] for held in self.cut])
        whole = (torch.cat(parts, 2) for parts in zip(*arrived, strict=True))
        every = tuple(chain(*self.cut))
        if every == tuple(sorted(every)):
            return tuple(whole)
        order = places(every, pieces[0].device).argsort()
        return tuple(x.index_select(2, order) for x in whole)

    def to_pieces(self, whole: Sequence[Tensor]) -> tuple[Tensor, ...]:
        sent = [[_held(x, pieces) for x in whole] for pieces in self.cut]
        t = count(self.cut[self.group.rank])
        taken = [[ranges[rank] for ranges in self.taken] for rank in self._all]
        arrived = self._alltoall(sent, [[(stop - start, t) for start, stop in of] for of in taken])
        pieces = []
        for x, num_heads, ranges, parts in zip(
            whole, self.heads, self.taken, zip(*arrived, strict=True), strict=True
        ):
            piece = x.new_zeros(x.shape[0], num_heads, t, x.shape[3], dtype=wide(x.dtype))
            for (start, stop), part in zip(ranges, parts, strict=True):
                piece[:, start:stop] += part
            pieces.append(piece.to(x.dtype))
        return tuple(pieces)

    @property
    def _all(self) -> range:
        return range(self.group.size)

    def _of(self, rank: int, tensors: Sequence[Tensor]) -> list[tuple[Tensor, tuple[int, int]]]:
        """Each tensor with the heads of it that a rank takes."""
        return [(x, ranges[rank]) for x, ranges in zip(tensors, self.taken, strict=True)]

    def _alltoall(
        self, sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]]
    ) -> list[list[Tensor]]:
        """What each rank has for this one; shapes are (heads, positions) of what arrives."""
        flat = torch.cat([part.flatten() for parts in sent for part in parts])
        lengths = None if self._even else [sum(x.numel() for x in parts) for parts in sent]
        B, _, _, K = sent[0][0].shape
        sizes = [[B * h * t * K for h, t in of] for of in shapes]
        arrived = self.group.alltoall(flat, lengths, take_lengths=[sum(of) for of in sizes])
        parts = torch.split(arrived, list(chain(*sizes)))
        views = (x.view(B, h, t, K) for x, (h, t) in zip(parts, chain(*shapes), strict=True))
        return [[next(views) for _ in of] for of in shapes]

    @property
    def _even(self) -> bool:
        """Whether all pairs of ranks exchange equally much: then no counts need be told."""
        taken = {
            sum(ranges[rank][1] - ranges[rank][0] for ranges in self.taken) for rank in self._all
        }
        return len(taken) == len({count(held) for held in self.cut}) == 1
