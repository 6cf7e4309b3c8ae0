"""Weight gradients that a split backward leaves for later.

    B  input gradients go on to the stage before at once
    W  weight gradients fill the bubbles            (Qi et al. 2023, "Zero Bubble", section 2)

A linear layer's backward asks whether they are wanted now. If not it keeps what the product needs,
its input and the gradient of its output, and the product itself is computed by the W action.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Kept = list[tuple[nn.Parameter, Callable[[], Tensor]]]
"""Parameters, each with the computation of what is to be added to its gradient."""


class Deferred:
    """What the layers of one stage hand to the one who carries out its actions."""

    def __init__(self) -> None:
        self._kept: Kept | None = None

    @property
    def active(self) -> bool:
        """Whether weight gradients are to be kept for later."""
        return self._kept is not None

    def begin(self) -> None:
        """From here on weight gradients are kept."""
        assert self._kept is None, "two backwards at once on one stage"
        self._kept = []

    def keep(self, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        assert self._kept is not None
        self._kept.append((parameter, compute))

    def end(self) -> Kept:
        """What was kept since ``begin``."""
        assert self._kept is not None
        kept, self._kept = self._kept, None
        return kept
