"""Matrix products in one with the movement between ranks beside them (Shoeybi et al. 2019).

                       forward                          backward, of the input
    column   replicated: none                           allreduce
             sharded over T: allgather                  reduce-scatter
    row      to replicated: allreduce                   none
             to sharded over T: reduce-scatter          allgather

Partial sums are written by the product straight into memory that the ranks share, where the sum
is taken there. What was gathered is gathered once more in backward rather than kept (Korthikanti
et al. 2022, section 4.2.2). A split backward leaves the weight's gradient for later
(``deferred.py``).

Shapes: B batch, T time, D in, K out; u is this rank's piece of T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mpmp.comm.group import Group
from mpmp.parallel import landing
from mpmp.parallel.adjoints import all_pieces, own_piece_of_sum
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
        x_BTD = _gathered(own_BuD, way, length)
        weights = [_cast(use, way, dtype) for use in uses]
        ctx.save_for_backward(own_BuD, *_kept(weights, uses, way))
        return tuple(
            F.linear(x_BTD, own_matrix(weight, use), _as(own_vector(use.bias, use), dtype))
            for weight, use in zip(weights, uses, strict=True)
        )

    @staticmethod
    @once_differentiable  # a second derivative would need sums over the ranks, too
    def backward(ctx: Any, *grads_BTK: Tensor) -> tuple[Tensor | None, ...]:
        own_BuD, *weights = ctx.saved_tensors
        way, uses = ctx.way, ctx.uses
        x_grad = None
        if ctx.needs_input_grad[0]:
            matrices = [
                own_matrix(weight, use).to(ctx.dtype)
                for weight, use in zip(weights, uses, strict=True)
            ]
            x_grad = _summed(_product_of(grads_BTK, matrices, way), way)
        found = _gradients(ctx, grads_BTK, cache(lambda: _gathered(own_BuD, way, ctx.length)), 4)
        return (x_grad, None, None, None, *found)


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
        grad_BTK = _gathered(grad, ctx.way, ctx.length)
        x_grad = grad_BTK @ weight.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return (x_grad, None, None, *_gradients(ctx, (grad_BTK,), lambda: x_BTD, 3))


def _gathered(x: Tensor, way: Way, length: int) -> Tensor:
    if way.group.size == 1 or not way.sequence:
        return x
    return all_pieces(x, way.group, length, 1).contiguous()


def summed_product(x_BTD: Tensor, weight: Tensor, use: Use, way: Way) -> Tensor:
    """``x @ W.T + b`` summed over the ranks; the weight as it was cast to the type of x."""
    # The first rank brings the bias.
    bias = _as(use.bias, x_BTD.dtype) if way.group.rank == 0 else None
    if way.group.size == 1:
        return F.linear(x_BTD, weight, bias)
    if way.sequence:
        return own_piece_of_sum(F.linear(x_BTD, weight, bias), way.group, 1)
    partial = way.group.empty((*x_BTD.shape[:-1], len(weight)), x_BTD.dtype, x_BTD.device)
    if bias is None:
        torch.mm(_rows(x_BTD), weight.t(), out=_rows(partial))
    else:
        torch.addmm(bias, _rows(x_BTD), weight.t(), out=_rows(partial))
    return way.group.allreduce(partial, out=partial)


def _product_of(grads: Sequence[Tensor], matrices: Sequence[Tensor], way: Way) -> Tensor:
    """The sum of the products, in shared memory where the sum over the ranks is taken there."""
    (*outer, _), features = grads[0].shape, matrices[0].shape[1]
    empty = torch.empty if way.sequence or way.group.size == 1 else way.group.empty
    total = empty((*outer, features), dtype=grads[0].dtype, device=grads[0].device)
    torch.mm(_rows(grads[0]), matrices[0], out=_rows(total))
    for grad, matrix in zip(grads[1:], matrices[1:], strict=True):
        _rows(total).addmm_(_rows(grad), matrix)
    return total


def _summed(x_BTD: Tensor, way: Way) -> Tensor:
    """The sum of the ranks' partial sums, or this rank's piece of it."""
    if way.group.size == 1:
        return x_BTD
    if way.sequence:
        return own_piece_of_sum(x_BTD, way.group, 1)
    return way.group.allreduce(x_BTD, out=x_BTD)


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
