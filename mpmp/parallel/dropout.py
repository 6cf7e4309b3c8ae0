"""Dropout whose mask does not depend on the layout.

The mask of an element is a function of (seed, name of the place, number of the sample, element in
the sample), so ranks that hold the same element drop it alike, however the model is cut.
"""

from __future__ import annotations

from torch import Tensor

from mpmp.parallel import counter


class Dropout:
    """Drops elements with ``probability`` and scales up the rest; ``name`` is global."""

    def __init__(self, probability: float, seed: int, name: str) -> None:
        self.probability = probability
        self._key = counter.key_of(seed, f"dropout/{name}")

    def __call__(
        self,
        x: Tensor,
        samples: Tensor | None,
        shape: tuple[int, ...],
        ranges: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """Apply to ``x`` (B, *piece), the ``ranges`` of a sample's global ``shape``.

        ``samples`` (B, int64) are the samples' numbers in the whole training; None drops nothing.
        """
        if self.probability == 0.0 or samples is None:
            return x
        length = 1
        for size in shape:
            length *= size
        index = counter.element_index(shape, ranges, x.device)
        first = samples.view(-1, *(1 for _ in shape)) * length
        kept = counter.keep(self._key, first + index, 1 - self.probability)
        return x * kept / (1 - self.probability)
