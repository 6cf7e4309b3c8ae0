"""Linear layers cut in two dims, over a grid of ranks: SUMMA.

    y = x W^T            across ->          x  tokens down, inputs across
                    down  00 01             W  inputs down, outputs across (stored as (outputs,
                      |   10 11                inputs), so that the grid is seen transposed)
                      v                     y  tokens down, outputs across

The inputs are summed over panel by panel: whoever has a panel of x broadcasts it along its row,
whoever has one of W along its column, and each rank multiplies and adds. Backward broadcasts the
panels once more; products with the gradient are reduced to the panel's owner, along rows for x and
along columns for W:

    forward    y   += x_s W_s^T        broadcast x_s across, W_s down
    backward   x_s  = sum dy W_s       broadcast W_s down,   reduce across
               W_s  = sum dy^T x_s     broadcast x_s across, reduce down

On q x r ranks a rank holds a (q r)-th of weights, inputs and outputs, where the layers of
``tensor.py`` hold a t-th of the weights and all of the hidden states. Forward it receives
N D (r-1)/(q r) + D K (q-1)/(q r) elements: less with every rank, where an allreduce of the outputs
moves 2 N K (t-1)/t. The price is more and smaller messages, two a panel, that the product waits
for. Van de Geijn and Watts 1997, "SUMMA"; for transformers Xu et al. 2021, "An efficient 2D method
for training super-large deep learning models" (Optimus).

Shapes: N tokens (any leading dims), D in, K out; a small letter is this rank's piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mpmp.comm.group import Group
from mpmp.parallel.maker import Maker
from mpmp.parallel.products import dtype_of_products
from mpmp.programs.partition import partition


class Panel(NamedTuple):
    """Inputs [start, stop) that lie on one column of ranks as x, and on one row of them as W."""

    start: int
    stop: int
    column: int
    row: int


@dataclass(frozen=True)
class Grid:
    """Two groups that cross in this rank: its column of the grid, and its row."""

    down: Group
    across: Group

    def panels(self, inputs: int) -> Iterator[Panel]:
        """The pieces of the inputs that no cut divides, ascending; they need not be alike."""
        rows = partition(inputs, self.down.size)
        for column, (first, end) in enumerate(partition(inputs, self.across.size)):
            for row, (top, bottom) in enumerate(rows):
                start, stop = max(first, top), min(end, bottom)
                if start < stop:
                    yield Panel(start, stop, column, row)

    def inputs_of(self, x_nd: Tensor, panel: Panel, inputs: int) -> Tensor:
        """The panel of x (n, s), from its owner in this row."""
        return _broadcast(x_nd, panel, inputs, self.across, panel.column)

    def weights_of(self, weight_kd: Tensor, panel: Panel, inputs: int) -> Tensor:
        """The panel of W (k, s), from its owner in this column."""
        return _broadcast(weight_kd, panel, inputs, self.down, panel.row)


def summa(x: Tensor, weight_kd: Tensor, grid: Grid, inputs: int) -> Tensor:
    """``x W^T`` of (..., d) and (k, d): this rank's (..., k); ``inputs`` is D.

    The leading dims are this rank's tokens, as many on all ranks of its row. Backward gives whole
    gradients of x and W. All ranks of the grid must call it.
    """
    result: Tensor = _Summa.apply(x, weight_kd, grid, inputs)  # type: ignore[no-untyped-call]
    return result


class _Summa(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_kd: Tensor, grid: Grid, inputs: int) -> Tensor:
        dtype = dtype_of_products(x)
        x, weight = x.to(dtype), weight_kd.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.grid, ctx.inputs, ctx.stored = grid, inputs, weight_kd.dtype
        x_nd = x.flatten(0, -2)
        y_nk = x_nd.new_zeros(len(x_nd), len(weight))
        for panel in grid.panels(inputs):
            x_ns = grid.inputs_of(x_nd, panel, inputs)
            y_nk.addmm_(x_ns, grid.weights_of(weight, panel, inputs).t())
        return y_nk.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable  # a second derivative would have to be broadcast and reduced, too
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grid, inputs = ctx.grid, ctx.inputs
        x_nd, grad_nk = x.flatten(0, -2), grad.flatten(0, -2)
        x_grad, weight_grad = torch.empty_like(x_nd), torch.empty_like(weight)
        for panel in grid.panels(inputs):
            if ctx.needs_input_grad[0]:
                part_ns = grad_nk @ grid.weights_of(weight, panel, inputs)
                _reduce(part_ns, x_grad, panel, inputs, grid.across, panel.column)
            if ctx.needs_input_grad[1]:
                part_ks = grad_nk.t() @ grid.inputs_of(x_nd, panel, inputs)
                _reduce(part_ks, weight_grad, panel, inputs, grid.down, panel.row)
        return (
            x_grad.view(x.shape) if ctx.needs_input_grad[0] else None,
            weight_grad.to(ctx.stored) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _own(x: Tensor, panel: Panel, inputs: int, group: Group) -> Tensor:
    """Where a panel lies in this rank's piece of the inputs."""
    first, _ = partition(inputs, group.size)[group.rank]
    return x[:, panel.start - first : panel.stop - first]


def _broadcast(x: Tensor, panel: Panel, inputs: int, group: Group, owner: int) -> Tensor:
    x = x.detach()  # what a function is given asks for gradients; what travels does not
    if group.size == 1:
        return x[:, panel.start : panel.stop]
    if group.rank == owner:
        piece = _own(x, panel, inputs, group).contiguous()
    else:
        piece = x.new_empty(len(x), panel.stop - panel.start)
    return group.broadcast(piece, owner, out=piece)


def _reduce(
    part: Tensor, total: Tensor, panel: Panel, inputs: int, group: Group, owner: int
) -> None:
    """Sum the ranks' products into the owner's gradient."""
    found = part if group.size == 1 else group.reduce(part.contiguous(), owner)
    if group.rank == owner:
        assert found is not None
        _own(total, panel, inputs, group).copy_(found)


class SummaLinear(nn.Module):
    """``x @ W.T + b``: (..., own inputs) of own tokens -> (..., own outputs) of the same.

    The grid is the context axis, which cuts tokens, by the tensor axis, which cuts features. W is
    (out, in), its outputs cut over the tensor axis and its inputs over the context axis: no
    two ranks of the grid hold the same element, and its gradient is whole. The bias is cut over
    the tensor axis; each context rank's gradient of it is a partial sum.
    """

    def __init__(
        self,
        make: Maker,
        name: str,
        in_features: int,
        out_features: int,
        *,
        std: float,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.grid, self.in_features = Grid(make.context, make.tensor), in_features
        self.weight = make.parameter(
            f"{name}.weight", (out_features, in_features), std=std, cut_dim=0, context_dim=1
        )
        self.bias = make.parameter(f"{name}.bias", (out_features,), cut_dim=0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = summa(x, self.weight, self.grid, self.in_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)
