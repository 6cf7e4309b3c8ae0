"""What a pipeline and a model know of each other: microbatches, parts, stages.

Shapes: B batch, T time, D model; t is the piece of a sequence that this rank's place on the context
axis holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpmp.parallel.cache import Cache
from mpmp.parallel.deferred import Deferred

NOT_COUNTED = -100
"""The target of a token whose loss does not count: padding, or a word that was not masked."""


@dataclass(frozen=True)
class Microbatch:
    """A piece of a replica's batch, as far as this rank's place on the context axis holds it."""

    inputs_Bt: Tensor
    targets_Bt: Tensor
    """The token to foretell at each place, or NOT_COUNTED."""
    samples_B: Tensor | None
    """Numbers of the sequences in the whole training, the keys of dropout; None drops nothing."""
    positions_t: Tensor
    """Places of the inputs in the sequence of T tokens, ascending; (B, t) where rows differ."""
    length: int
    """T, the tokens of a whole sequence."""
    lengths_B: Tensor | None = None
    """Tokens of each sequence, padding follows; None where all have T."""
    cache: Cache | None = None
    """In generation: keys and values of the tokens before these."""

    @property
    def rows(self) -> int:
        return self.inputs_Bt.shape[0]

    @property
    def count(self) -> int:
        """t, tokens of a sequence that are here."""
        return self.positions_t.shape[-1]


@dataclass(frozen=True)
class Part:
    """One stage of the pipeline; a rank holds one or several."""

    number: int
    stages: int
    layers: tuple[int, int]
    """The layers (start, stop) of the model that it holds."""
    shared: tuple[int, ...] = ()
    """Pipeline ranks that hold a copy of a tied embedding, where the ends are on several."""

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.stages - 1


class Stage(Protocol):
    """What a model must offer to be a stage; see models/."""

    dtype: torch.dtype
    deferred: Deferred

    def __call__(self, x: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states, and what this stage itself adds to the objective.

        ``x`` is the microbatch's tokens on the first stage and hidden states on the others. What
        is added is a scalar, the sum over the microbatch's sequences, or None.
        """
        ...

    def losses(self, hidden: Tensor, microbatch: Microbatch) -> Tensor:
        """Cross entropy of each token in nats, (B, t), 0 where not counted; last stage only."""
        ...

    def logits(self, hidden: Tensor, microbatch: Microbatch) -> Tensor:
        """Logits over the whole vocabulary, (B, t, V); last stage only."""
        ...

    def hidden_shape(self, microbatch: Microbatch) -> tuple[int, int, int]:
        """Of the hidden states at the stage's borders: less than t under sequence parallelism."""
        ...
