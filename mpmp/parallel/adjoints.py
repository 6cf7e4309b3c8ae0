"""Movements of data between ranks, each beside its backward.

Every movement is a linear operator; its backward is its adjoint, proved by <Fx, y> = <x, F*y> at
1, 2, 3 and 4 ranks. A value on a group is one of three things, and inner products count it so:

    replicated   the same on every rank; one vector, counted once
    partial      a summand on every rank; n vectors, the value is their sum
    sharded      a piece, along one dim, on every rank; one vector, cut

    forward                               backward
    replicated --replicate--> partial     partial --allreduce--> replicated
    partial    --allreduce--> replicated  replicated --replicate--> partial
    sharded    --gather--> replicated     replicated --split--> sharded
    replicated --split--> sharded         sharded --gather--> replicated
    partial    --reduce_scatter--> sharded   sharded --allgather--> partial
    sharded    --allgather--> partial     partial --reduce_scatter--> sharded

``replicate`` and ``allreduce`` are Megatron's f and g (Shoeybi et al. 2019, section 3). A
*gradient* of a replicated value is replicated, too: each rank of the group holds all of it, so
``gather``'s backward merely keeps this rank's piece, while ``allgather`` feeds ranks that go
different ways, whose gradients are summed. ``products.py`` has them in one with a matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpmp.comm.group import Group
from mpmp.programs.partition import partition


def replicate(x: Tensor, group: Group) -> Tensor:
    """Replicated -> partial: the same values, now used differently on each rank."""
    return x if group.size == 1 else _call(_Replicate, x, group)


def allreduce(x: Tensor, group: Group) -> Tensor:
    """Partial -> replicated: the sum over the group."""
    return x if group.size == 1 else _call(_Allreduce, x, group)


def split(x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """Replicated -> sharded: this rank's piece along ``dim``, ``partition`` of its length."""
    return x if group.size == 1 else _call(_Split, x, group, dim)


def gather(x: Tensor, group: Group, length: int, dim: int = 0) -> Tensor:
    """Sharded -> replicated: all pieces of a dim of ``length``."""
    return x if group.size == 1 else _call(_Gather, x, group, length, dim)


def reduce_scatter(x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """Partial -> sharded: this rank's piece, along ``dim``, of the sum over the group."""
    return x if group.size == 1 else _call(_ReduceScatter, x, group, dim)


def allgather(x: Tensor, group: Group, length: int, dim: int = 0) -> Tensor:
    """Sharded -> partial: all pieces, each rank going its own way with them."""
    return x if group.size == 1 else _call(_Allgather, x, group, length, dim)


# --- the movements themselves -----------------------------------------------------------------


def _own_piece(x: Tensor, group: Group, dim: int) -> Tensor:
    start, stop = partition(x.shape[dim], group.size)[group.rank]
    return x.narrow(dim, start, stop - start).contiguous()


def all_pieces(x: Tensor, group: Group, length: int, dim: int) -> Tensor:
    """``allgather`` without a graph."""
    lengths = [stop - start for start, stop in partition(length, group.size)]
    rows = x.detach().movedim(dim, 0).contiguous()
    return group.allgather(rows, lengths).movedim(0, dim)


def own_piece_of_sum(x: Tensor, group: Group, dim: int) -> Tensor:
    """``reduce_scatter`` without a graph."""
    return group.reduce_scatter(x.detach().movedim(dim, 0).contiguous()).movedim(0, dim)


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.allreduce(grad.contiguous()), None


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.allreduce(x.detach().contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.length = group, dim, x.shape[dim]
        return _own_piece(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_pieces(grad, ctx.group, ctx.length, ctx.dim), None, None


class _ReduceScatter(_Split):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.length = group, dim, x.shape[dim]
        return own_piece_of_sum(x, group, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, length: int, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_pieces(x, group, length, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _own_piece(grad, ctx.group, ctx.dim), None, None, None


class _Allgather(_Gather):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return own_piece_of_sum(grad, ctx.group, ctx.dim), None, None, None


def _call(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result
