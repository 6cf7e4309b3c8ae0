"""Dropout whose mask does not depend on the layout.

The mask of an element is a function of (seed, name of the place, number of the sample, element in
the sample), so ranks that hold the same element drop it alike, however the model is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from mpmp.parallel import counter
from mpmp.parallel.counter import Index


class Dropout:
    """Drops elements with ``probability`` and scales up the rest; ``name`` is global."""

    def __init__(self, probability: float, seed: int, name: str) -> None:
        self.probability = probability
        self._key = counter.key_of(seed, f"dropout/{name}")

    def __call__(
        self, x: Tensor, samples: Tensor | None, shape: tuple[int, ...], index: Sequence[Index]
    ) -> Tensor:
        """Apply to ``x`` (B, *piece): of a sample's global ``shape`` the places ``index``.

        Along each dim these are a (start, stop) or an int64 vector of places. ``samples``
        (B, int64) are the samples' numbers in the whole training; None drops nothing.
        """
        if self.probability == 0.0 or samples is None:
            return x
        return x * self.kept(samples, shape, index) / (1 - self.probability)

    def kept(self, samples: Tensor, shape: tuple[int, ...], index: Sequence[Index]) -> Tensor:
        """True where an element stays, (B, *piece) of bool."""
        first = samples.view(-1, *(1 for _ in shape)) * prod(shape)
        places = counter.element_index(shape, index, samples.device)
        return counter.keep(self._key, first + places, 1 - self.probability)
