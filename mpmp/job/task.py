"""What a run asks of the task that it serves: what is read, judged, shown and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mpmp.comm.mesh import Mesh
from mpmp.config import Config
from mpmp.data.objective import Objective
from mpmp.job.language import LanguageTask
from mpmp.job.report import Metrics, Reporter
from mpmp.job.tagging import TaggingTask
from mpmp.job.training import Training


class Task(Protocol):
    """What was read for a configuration; all ranks call its methods together."""

    sha256: str
    """Of what is learnt from and validated on."""

    @property
    def objective(self) -> Objective:
        """What the model is asked."""
        ...

    def asked(self, config: Config) -> Objective:
        """What a model of other settings is asked of the same data."""
        ...

    @property
    def tokenizer(self) -> str | None:
        """Text of the tokenizer's file, where there is one."""
        ...

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint must know beside the settings; another cannot be gone on with."""
        ...

    def head(self, training: Training) -> tuple[str, dict[str, Any]]:
        """A line about what is read, and what the metrics say of it."""
        ...

    def validate(self, training: Training) -> tuple[str, dict[str, Any]]:
        """The validation in words, and in numbers."""
        ...

    def finish(
        self, training: Training, folder: Path, number: int, show: Reporter, metrics: Metrics
    ) -> None:
        """What is shown and written when the last step, ``number``, has been validated."""
        ...


READERS: dict[str, Callable[[Config, Mesh], Task]] = {
    "language": LanguageTask,
    "tagging": TaggingTask,
}
"""Reads the data of each, all ranks together."""
