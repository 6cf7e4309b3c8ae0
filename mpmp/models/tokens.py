"""What blocks know of a microbatch beside its hidden states.

Shapes: B batch, t positions of this rank's place on the context axis; u is the piece of them that
it holds between cut layers: all of them but under sequence parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpmp.parallel.cache import Cache
from mpmp.parallel.dropout import Dropout
from mpmp.parallel.expert import Places
from mpmp.parallel.maker import Maker
from mpmp.parallel.stage import Microbatch
from mpmp.programs.partition import partition


@dataclass(frozen=True)
class Tokens:
    """Where the tokens stand; see Microbatch."""

    samples_B: Tensor | None
    lengths_B: Tensor | None
    length: int
    """T, the tokens of a whole sequence."""
    positions_t: Tensor
    positions_u: Tensor
    places: Places
    """As a feed-forward takes them; in generation those of the step alone."""
    turns: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of RoPE, (t, K), where queries and keys turn."""
    cache: Cache | None = None
    """In generation: keys and values of the tokens before these."""

    @property
    def count(self) -> int:
        """t, what cut layers work on."""
        return self.positions_t.shape[-1]

    def drop(self, dropout: Dropout, x_BuD: Tensor) -> Tensor:
        """``x_BuD`` with some of its elements dropped, alike on every layout."""
        width = x_BuD.shape[-1]
        places = (self.positions_u, (0, width))
        return dropout(x_BuD, self.samples_B, (self.length, width), places)


def tokens_of(
    microbatch: Microbatch, make: Maker, turns: tuple[Tensor, Tensor] | None = None
) -> Tokens:
    """A microbatch as this rank's blocks see it."""
    start, stop = own_piece(make, microbatch.count)
    positions_t, lengths_B = microbatch.positions_t, microbatch.lengths_B
    places_t = positions_t
    if microbatch.cache is not None:
        places_t = torch.arange(microbatch.length, device=positions_t.device)
    return Tokens(
        microbatch.samples_B,
        lengths_B,
        microbatch.length,
        positions_t,
        positions_t[..., start:stop],
        Places(microbatch.length, places_t, places_t[start:stop], lengths_B),
        turns,
        microbatch.cache,
    )


def own_piece(make: Maker, count: int) -> tuple[int, int]:
    """Of ``count`` positions those (start, stop) that this rank holds between cut layers."""
    if not make.sequence:
        return 0, count
    return partition(count, make.tensor.size)[make.tensor.rank]
