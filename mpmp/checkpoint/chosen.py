"""What a folder that a command was given means: a run with its steps, or one step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpmp.checkpoint import folder as run_folder
from mpmp.checkpoint import manifest
from mpmp.checkpoint.manifest import Manifest
from mpmp.comm.agreement import reason
from mpmp.errors import CheckpointError, InputOutputError


@dataclass(frozen=True)
class Chosen:
    """The folder of a run, and those of its steps that are meant, by name."""

    run: Path
    steps: Mapping[str, Manifest | str]
    """Of each its manifest, or a sentence that says what is wrong with it."""
    one: bool
    """Whether one step was named, and not the run."""

    def newest(self) -> tuple[Path, Manifest]:
        """The step that was saved last, of those whose manifests are good."""
        good = {name: one for name, one in self.steps.items() if isinstance(one, Manifest)}
        if not good:
            raise CheckpointError(f"no good checkpoint in {self.run}: {'; '.join(self.bad())}")
        name = max(good, key=lambda name: (good[name].serial, name))
        return self.run / name, good[name]

    def bad(self) -> list[str]:
        """A sentence for each step whose manifest is not good."""
        return [f"{name} {one}" for name, one in self.steps.items() if isinstance(one, str)]


def choose(given: str) -> Chosen:
    """The run or the step that a folder is; InputOutputError, CheckpointError where it is none."""
    path = Path(given)
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise InputOutputError(f"{path} is not a folder; name that of a run or of one step")
    if os.path.lexists(path / manifest.FILE) or path.name in run_folder.step_folders(path.parent):
        run, names = path.parent, [path.name]
    else:
        run, names = path, run_folder.step_folders(path)
    if not names:
        raise CheckpointError(f"{path} holds no checkpoint, nor is it one")
    return Chosen(run, {name: _manifest(run / name) for name in names}, one=run != path)


def _manifest(step: Path) -> Manifest | str:
    try:
        return run_folder.read_manifest(step)[1]
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {reason(error, '')}"
