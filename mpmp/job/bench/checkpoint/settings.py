"""What ``mpmp.bench checkpoint`` can be told; nothing here needs torch or MPI."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpmp.config import Comm
from mpmp.errors import ConfigError


@dataclass(frozen=True)
class Checkpoints:
    """The size of the state, where it is saved, and how often."""

    folder: str = "runs/bench-checkpoint"
    """A folder on the disk that is measured; what is saved there is removed at the end."""
    megabytes: int = 512
    """Size of the whole state: a third of it weights, the rest moments."""
    repeats: int = 5
    """Saves of each kind that are timed; one goes before them to warm up."""
    csv: str | None = None
    """File that takes the rows, too."""
    comm: Comm = field(default_factory=Comm)
    """How bytes travel."""

    def __post_init__(self) -> None:
        for name in ("megabytes", "repeats"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"--{name} must be at least 1, not {value}")
