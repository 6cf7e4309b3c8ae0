"""The global gradient norm: every element of the model counted once, wherever its copies are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mpmp.comm.group import Group
from mpmp.parallel.placement import placement_of


def global_norm(parameters: Iterable[nn.Parameter], model: Group) -> Tensor:
    """Square root of the sum of squares of all gradients of one replica, a float64 scalar.

    ``model`` is the group of all ranks of the replica. The same on all of them.
    """
    own = [one for one in parameters if placement_of(one).primary]
    squares = torch.zeros((), dtype=torch.float64, device=own[0].device if own else "cpu")
    for one in own:
        assert one.grad is not None
        squares += one.grad.double().square().sum()
    return model.allreduce(squares.view(1)).sqrt().squeeze(0)


def clip_(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients down to the norm ``limit`` where they exceed it; 0 never clips."""
    if limit == 0 or norm <= limit:
        return
    scale = float(limit / norm)
    for one in parameters:
        assert one.grad is not None
        one.grad.mul_(scale)
