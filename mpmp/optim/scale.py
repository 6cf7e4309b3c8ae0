"""The loss scale that keeps float16 gradients from vanishing (Micikevicius et al. 2018, 3.2).

The smallest gradients lie below what 16 bits hold, so the loss is multiplied by a scale and the
gradients are divided by it afterwards. The scale doubles after many good steps and is halved when
a gradient overflows; that step is left out and changes nothing.

Whether it overflowed is asked of the global norm, which is the same on all ranks: all replicas and
all stages of a pipeline take a step, or none.
"""

from __future__ import annotations

from collections.abc import Mapping

INITIAL = 2.0**16
GROWTH_STEPS = 2000
"""Steps without overflow after which a larger scale is tried."""
_LARGEST = 2.0**24
"""Beyond it only weights that have vanished gain; float32 sums keep their range."""


class LossScale:
    """The scale of the next step; 1 for good where it is not ``enabled``."""

    def __init__(
        self, *, enabled: bool, initial: float = INITIAL, growth_steps: int = GROWTH_STEPS
    ) -> None:
        self.enabled = enabled
        self.value = initial if enabled else 1.0
        self._growth_steps, self._good = growth_steps, 0

    def update(self, finite: bool) -> bool:
        """Learn from a step whether its norm was finite; whether the step is to be taken."""
        if not self.enabled:
            return finite
        if not finite:
            self.value, self._good = max(1.0, self.value / 2), 0
            return False
        self._good += 1
        if self._good == self._growth_steps:
            self.value, self._good = min(_LARGEST, self.value * 2), 0
        return True

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it; nothing where it is not enabled."""
        return {"value": self.value, "good": float(self._good)} if self.enabled else {}

    def load(self, state: Mapping[str, float]) -> None:
        """Take back what :meth:`state` gave; a run in another precision had no scale to go on."""
        if self.enabled and state:
            self.value = max(1.0, state.get("value", self.value))
            self._good = int(state.get("good", 0))
