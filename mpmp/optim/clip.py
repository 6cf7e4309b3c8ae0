"""The global gradient norm: every element of the model counted once, wherever its copies are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mpmp.comm.group import Group
from mpmp.parallel.zero import Piece


def global_norm(pieces: Iterable[Piece], everyone: Group) -> Tensor:
    """Square root of the sum of squares of all gradients, a float64 scalar.

    ``everyone`` is the group of all ranks; the norm is the same on all of them, and not finite
    where a gradient of any of them is not.
    """
    squares = [_square(piece) for piece in pieces if piece.counts]
    # A dot product reads a gradient once and needs no room; the sum over tensors is of doubles.
    own = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    return everyone.allreduce(own.view(1)).sqrt().squeeze(0)


def clip_(pieces: Iterable[Piece], norm: float | Tensor, limit: float, scale: float = 1.0) -> None:
    """Divide gradients by the loss ``scale``, and scale them down to the norm ``limit``.

    ``norm`` is that of the gradients as they are; a limit of 0 never clips.
    """
    norm = float(norm)
    factor = limit / norm if limit and norm > limit * scale else 1 / scale
    gradients = [gradient for piece in pieces if (gradient := piece.parameter.grad) is not None]
    if factor != 1 and gradients:
        torch._foreach_mul_(gradients, factor)


def _square(piece: Piece) -> Tensor:
    assert piece.parameter.grad is not None
    flat = piece.parameter.grad.view(-1)
    return flat.dot(flat).double()
