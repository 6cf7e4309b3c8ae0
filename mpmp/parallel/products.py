"""Matrix products in one with the movement between ranks beside them (Shoeybi et al. 2019).

                       forward                          backward, of the input
    column   replicated: none                           allreduce
             sharded over T: allgather                  reduce-scatter
    row      to replicated: allreduce                   none
             to sharded over T: reduce-scatter          allgather

Partial sums are written by the product straight into memory that the ranks share, where the sum
is taken there; over a network it moves beside the products (``beside.py``). What was gathered is
gathered once more in backward rather than kept (Korthikanti et al. 2022, section 4.2.2): beside the
product that gives the input's gradient, whose sum moves beside that of the weight's. A split
backward leaves the weight's gradient for later (``deferred.py``).

Shapes: B batch, T time, D in, K out; u is this rank's piece of T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mpmp.comm.group import Group
from mpmp.parallel import landing
from mpmp.parallel.beside import Gathered, summed
from mpmp.parallel.deferred import Deferred

_Given = TypeVar("_Given", Tensor, Tensor | None)


class Use(NamedTuple):
    """A weight (..., K, D) and its bias (..., K) as a product takes them.

    All but the last dim are one; ``rows`` (start, stop) says which of the last dim but one count,
    where it is not all.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Way:
    """How a layer's inputs and outputs travel.

    ``sequence``: between the cut layers the ranks hold pieces of T. ``transient``: weights are
    there only while their layer computes, and nothing that was cast from them is kept. ``call``
    applies a function; one that a compiler is not to look into, where blocks are compiled.
    """

    group: Group
    deferred: Deferred
    sequence: bool = False
    transient: bool = False
    call: Callable[..., Any] = lambda function, *arguments: function.apply(*arguments)

    def gathered(self, own_BuD: Tensor, length: int) -> Gathered:
        """All tokens of what goes into a product."""
        return Gathered(own_BuD, self.group, length, self.sequence)

    def summed(
        self,
        shape: Sequence[int],
        like: Tensor,
        compute: Callable[[slice, Tensor], object],
        ahead: bool = False,
    ) -> Callable[[], Tensor]:
        """What waits for the sum of partial sums (see ``beside.summed``)."""
        # In memory that ranks share where the sum is taken there.
        empty = torch.empty if self.sequence or self.group.size == 1 else self.group.empty
        partial_BTK = empty(tuple(shape), dtype=like.dtype, device=like.device)
        return summed(partial_BTK, compute, self.group, sequence=self.sequence, ahead=ahead)


def column(x: Tensor, uses: Sequence[Use], way: Way, length: int) -> tuple[Tensor, ...]:
    """``x @ W.T + b`` by several weights whose outputs are cut: one movement for all of them.

    ``x`` is (B, T, D), the same on all ranks, or (B, u, D) with ``way.sequence``; ``length`` is
    T. Gives (B, T, own K) for each weight.
    """
    if way.group.size == 1 and torch.compiler.is_compiling():
        return tuple(
            F.linear(x, own_matrix(use.weight, use), own_vector(use.bias, use)) for use in uses
        )
    if not (torch.is_grad_enabled() or way.sequence):  # nothing is kept for a backward
        x = _as(x, dtype := dtype_of_products(x))
        return tuple(
            F.linear(
                x, own_matrix(_cast(use, way, dtype), use), _as(own_vector(use.bias, use), dtype)
            )
            for use in uses
        )
    tensors = [one for use in uses for one in (use.weight, use.bias)]
    return way.call(_Column, x, tuple(uses), way, length, *tensors)  # type: ignore[no-any-return]


def row(x: Tensor, use: Use, way: Way) -> Tensor:
    """``x @ W.T + b`` whose inputs are cut, summed over the ranks: (B, T, own D) -> (B, T, K).

    With ``way.sequence`` each rank gets its piece, (B, u, K).
    """
    if way.group.size == 1 and torch.compiler.is_compiling():
        return F.linear(x, use.weight, use.bias)
    if not (torch.is_grad_enabled() or way.sequence):
        x = _as(x, dtype := dtype_of_products(x))
        return summed_product(x, _cast(use, way, dtype), use, way)
    return way.call(_Row, x, use, way, use.weight, use.bias)  # type: ignore[no-any-return]


# --- inside ---------------------------------------------------------------------------------------


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, uses: tuple[Use, ...], way: Way, length: int, *_: Tensor | None
    ) -> tuple[Tensor, ...]:
        dtype = dtype_of_products(x)
        own_BuD = x.to(dtype)
        ctx.uses, ctx.way, ctx.length, ctx.dtype = uses, way, length, dtype
        inputs = way.gathered(own_BuD, length)
        weights = [_cast(use, way, dtype) for use in uses]
        ctx.save_for_backward(own_BuD, *_kept(weights, uses, way))
        linears = [
            (own_matrix(weight, use), _as(own_vector(use.bias, use), dtype))
            for weight, use in zip(weights, uses, strict=True)
        ]
        found = [[F.linear(x_bTD, *linear) for linear in linears] for x_bTD in inputs.pieces()]
        return tuple(_joined(pieces) for pieces in zip(*found, strict=True))

    @staticmethod
    @once_differentiable  # a second derivative would need sums over the ranks, too
    def backward(ctx: Any, *grads_BTK: Tensor) -> tuple[Tensor | None, ...]:
        own_BuD, *weights = ctx.saved_tensors
        way, uses = ctx.way, ctx.uses
        inputs = way.gathered(own_BuD, ctx.length)
        weights_follow = any(ctx.needs_input_grad[4::2]) and not way.deferred.active
        if weights_follow:
            inputs.start()
        x_sum = None
        if ctx.needs_input_grad[0]:
            matrices = [
                own_matrix(weight, use).to(ctx.dtype)
                for weight, use in zip(weights, uses, strict=True)
            ]
            x_sum = _sum_of_products(grads_BTK, matrices, way, ahead=weights_follow)
        found = _gradients(ctx, grads_BTK, inputs.whole, 4)
        return (None if x_sum is None else x_sum(), None, None, None, *found)


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, use: Use, way: Way, *_: Tensor | None) -> Tensor:
        dtype = dtype_of_products(x)
        x_BTD, weight = x.to(dtype), _cast(use, way, dtype)
        ctx.uses, ctx.way, ctx.length, ctx.dtype = (use,), way, x.shape[1], dtype
        ctx.save_for_backward(x_BTD, *_kept([weight], ctx.uses, way))
        return summed_product(x_BTD, weight, use, way)

    @staticmethod
    @once_differentiable  # as above
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, weight = ctx.saved_tensors
        grads = ctx.way.gathered(grad, ctx.length)
        x_grad = None
        if ctx.needs_input_grad[0]:
            matrix = weight.to(ctx.dtype)
            x_grad = _joined([grad_bTK @ matrix for grad_bTK in grads.pieces()])
        return (x_grad, None, None, *_gradients(ctx, (grads.whole(),), lambda: x_BTD, 3))


def summed_product(x_BTD: Tensor, weight: Tensor, use: Use, way: Way) -> Tensor:
    """``x @ W.T + b`` summed over the ranks; the weight as it was cast to the type of x."""
    # The first rank brings the bias.
    bias = _as(use.bias, x_BTD.dtype) if way.group.rank == 0 else None
    if way.group.size == 1:
        return F.linear(x_BTD, weight, bias)
    rows_ND = _rows(x_BTD)

    def compute(rows: slice, out_nK: Tensor) -> None:
        if bias is None:
            torch.mm(rows_ND[rows], weight.t(), out=out_nK)
        else:
            torch.addmm(bias, rows_ND[rows], weight.t(), out=out_nK)

    return way.summed((*x_BTD.shape[:-1], len(weight)), x_BTD, compute)()


def _sum_of_products(
    grads: Sequence[Tensor], matrices: Sequence[Tensor], way: Way, ahead: bool
) -> Callable[[], Tensor]:
    """What waits for the sum of the products, over the weights and over the ranks."""
    grads_NK = [_rows(grad) for grad in grads]

    def compute(rows: slice, out_nD: Tensor) -> None:
        torch.mm(grads_NK[0][rows], matrices[0], out=out_nD)
        for grad_NK, matrix in zip(grads_NK[1:], matrices[1:], strict=True):
            out_nD.addmm_(grad_NK[rows], matrix)

    shape = (*grads[0].shape[:-1], matrices[0].shape[1])
    return way.summed(shape, grads[0], compute, ahead)


def _gradients(
    ctx: Any, grads: Sequence[Tensor], inputs: Callable[[], Tensor], first: int
) -> list[Tensor | None]:
    """Gradients of each weight and bias, None for what is left for later or not wanted."""
    found: list[Tensor | None] = []
    for use, grad in zip(ctx.uses, grads, strict=True):
        needs_weight, needs_bias = ctx.needs_input_grad[first : first + 2]
        compute = partial(_weight_gradient, use, grad, inputs)
        if needs_weight and ctx.way.deferred.active:
            ctx.way.deferred.keep(use.weight, compute)
            needs_weight = False
        found.append(_given_or_added(use, grad, inputs) if needs_weight else None)
        found.append(_bias_gradient(use, grad) if needs_bias else None)
        first += 2
    return found


def _given_or_added(use: Use, grad: Tensor, inputs: Callable[[], Tensor]) -> Tensor | None:
    """The weight's gradient for autograd, or None where it was added in its place."""
    product = _rows(grad).t() @ _rows(inputs())
    if use.rows is None and landing.add(use.weight, product):
        return None
    return _spread(product.to(use.weight.dtype), use.weight, use.rows, -2)


@torch.no_grad()
def _weight_gradient(use: Use, grad: Tensor, inputs: Callable[[], Tensor]) -> Tensor:
    gradient = (_rows(grad).t() @ _rows(inputs())).to(use.weight.dtype)
    return _spread(gradient, use.weight, use.rows, -2)


def _bias_gradient(use: Use, grad: Tensor) -> Tensor:
    assert use.bias is not None
    # Summed in float32 and rounded once; asking for float32 would make a wide copy first.
    gradient = _rows(grad).sum(0).to(use.bias.dtype)
    return _spread(gradient, use.bias, use.rows, -1)


def _spread(gradient: Tensor, like: Tensor, rows: tuple[int, int] | None, dim: int) -> Tensor:
    """A gradient of the rows that were used as one of the whole."""
    if rows is None:
        return gradient.view(like.shape)
    whole = torch.zeros_like(like)
    part = whole.narrow(dim, rows[0], rows[1] - rows[0])
    part.copy_(gradient.view(part.shape))
    return whole


def _cast(use: Use, way: Way, dtype: torch.dtype) -> Tensor:
    if use.weight.dtype is dtype:
        return use.weight
    return use.weight.to(dtype) if way.transient else landing.cast(use.weight, dtype)


def own_matrix(weight: Tensor, use: Use) -> Tensor:
    """The (K, D) matrix of the rows that are used."""
    if use.rows is not None:
        weight = weight.narrow(-2, use.rows[0], use.rows[1] - use.rows[0])
    return weight if weight.dim() == 2 else weight.flatten(0, -2)


def own_vector(bias: Tensor | None, use: Use) -> Tensor | None:
    """The bias of those rows."""
    if bias is not None and use.rows is not None:
        bias = bias.narrow(-1, use.rows[0], use.rows[1] - use.rows[0])
    return bias if bias is None or bias.dim() == 1 else bias.flatten()


def _kept(cast: Sequence[Tensor], uses: Sequence[Use], way: Way) -> list[Tensor]:
    """What backward is to have of the weights.

    Those themselves, not views of them: memory that is filled anew must be found there.
    """
    return [use.weight if way.transient else one for one, use in zip(cast, uses, strict=True)]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _as(x: _Given, dtype: torch.dtype) -> _Given:
    return x if x is None or x.dtype is dtype else x.to(dtype)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """Autocast does not look into functions, and leaves float64 as it is."""
    device = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
