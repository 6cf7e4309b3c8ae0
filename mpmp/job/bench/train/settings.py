"""What ``mpmp.bench train`` can be told; nothing here needs torch or MPI."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from mpmp.config import Comm
from mpmp.errors import ConfigError, LayoutError
from mpmp.programs.tables import look_up

MODES = {
    "one": "plain torch",
    "data": "DDP",
    "zero3": "FSDP2",
    "tensor": "DTensor",
    "pipeline": "torch pipelining",
}
"""Each way to use the ranks, and what torch has for it."""


@dataclass(frozen=True)
class TrainSteps:
    """The model, the modes, and how long each is measured."""

    modes: str = "all"
    """Names with commas between: one, data, zero3, tensor, pipeline; or all."""
    layers: int = 6
    heads: int = 6
    width: int = 384
    """Features of a token between the blocks; a multiple of the heads."""
    vocabulary: int = 4096
    context: int = 256
    """Tokens a sequence has."""
    batch: int = 4
    """Sequences of a microbatch: of each replica, or of each piece that passes a pipeline."""
    microbatches: int = 8
    """Pieces of a pipeline's batch."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic: bfloat16 under autocast, weights and states in float32; or all in float32."""
    steps: int = 2
    """Optimiser steps of a turn."""
    repeats: int = 9
    """Turns of each that are timed; one goes before them to warm up. Losses of all are compared."""
    learning_rate: float = 3e-4
    csv: str | None = None
    """File that takes the rows, too."""
    comm: Comm = field(default_factory=Comm)
    """How our bytes travel."""

    def __post_init__(self) -> None:
        _ = self.names  # wrong ones are refused now
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"--{one.name} must be at least 1, not {value}")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"--learning_rate must lie in (0, 1), not {self.learning_rate}")
        if self.width % self.heads:
            raise ConfigError(f"--width {self.width} must be a multiple of --heads {self.heads}")

    @property
    def names(self) -> list[str]:
        """Modes that are measured."""
        asked = [name.strip() for name in self.modes.split(",") if name.strip()]
        if asked == ["all"]:
            return list(MODES)
        if not asked:
            raise ConfigError(f"--modes needs names with commas between, not {self.modes!r}")
        for name in asked:
            look_up(MODES, name, "mode")
        return list(dict.fromkeys(asked))

    @property
    def num_steps(self) -> int:
        """Steps that each contender takes, to warm up and in all turns."""
        return self.steps * (self.repeats + 1)

    def require_ranks(self, ranks: int) -> None:
        """LayoutError where the ranks cannot take part in every mode that was asked for."""
        several = [name for name in self.names if name != "one"]
        if ranks == 1 and several:
            raise LayoutError(
                f"mode {several[0]} of bench train needs at least 2 ranks but 1 was started; "
                "use mpirun -n 2, or --modes one"
            )
        # torch's side cuts evenly; ours would cut these, too.
        cuts = {"tensor": ("heads", "vocabulary"), "pipeline": ("layers",)}
        for mode in several:
            for name in cuts.get(mode, ()):
                value = getattr(self, name)
                if value % ranks:
                    raise LayoutError(
                        f"mode {mode} of bench train cuts --{name} {value} evenly, as torch does, "
                        f"which {ranks} ranks cannot; use a multiple of {ranks}"
                    )
