"""What a rank holds of a model that is trained, in bytes, beside what ZeRO's formula says.

The paper counts 2 bytes for a weight, 2 for a gradient and 12 for Adam (a float32 weight and two
moments). Here weights and gradients are float32, of which products take 16 bits at most, so that a
parameter takes 4 + 4 + 8 = 16, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpmp.parallel.zero import Sharded


@dataclass(frozen=True)
class States:
    """Bytes of weights, gradients and optimizer states; and of memory that they pass through."""

    weights: float
    gradients: float
    optimizer: float
    passage: float = 0.0
    """Slots in which weights are gathered, and in which gradients are summed."""

    @property
    def total(self) -> float:
        """What the formula counts."""
        return self.weights + self.gradients + self.optimizer


def formula(
    parameters: int, ranks: int, stage: int, itemsizes: tuple[int, int, int] = (4, 4, 8)
) -> States:
    """Bytes for P parameters shared out over N ranks by a stage (Rajbhandari et al. 2019).

    ``itemsizes`` are those of weights, gradients and optimizer states.
    """
    weight, gradient, optimizer = (parameters * size for size in itemsizes)
    return States(
        weight / ranks if stage >= 3 else weight,
        gradient / ranks if stage >= 2 else gradient,
        optimizer / ranks if stage >= 1 else optimizer,
    )


def held(sharded: Sharded, optimizer: torch.optim.Optimizer) -> States:
    """What the live tensors of this rank take, by the memory they lie in."""
    pieces = [piece.parameter for piece in sharded.pieces()]
    parameters = [one for bucket in sharded.buckets for one in bucket.flat.parameters]
    weights = _storages(pieces)
    gradients = _storages(one.grad for one in pieces if one.grad is not None)
    states = _storages(
        one
        for state in optimizer.state.values()
        for one in state.values()
        if isinstance(one, Tensor)
    )
    slots = _storages([*parameters, *(bucket.memory for bucket in sharded.buckets)])
    slots |= _storages(one.grad for one in parameters if one.grad is not None)
    passage = {at: size for at, size in slots.items() if at not in weights and at not in gradients}
    return States(*(float(sum(one.values())) for one in (weights, gradients, states, passage)))


def _storages(tensors: Iterable[Tensor | nn.Parameter]) -> dict[int, int]:
    """Bytes of the memories that tensors lie in, each once, by their addresses."""
    found = (one.untyped_storage() for one in tensors)
    return {one.data_ptr(): one.nbytes() for one in found}
