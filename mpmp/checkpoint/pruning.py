"""Old checkpoints of a run removed, as a run itself removes them after a save."""

from __future__ import annotations

from dataclasses import dataclass

from mpmp.checkpoint import folder as run_folder
from mpmp.checkpoint.alone import ALONE
from mpmp.checkpoint.chosen import choose
from mpmp.checkpoint.locking import locked
from mpmp.comm.agreement import on_first
from mpmp.errors import ConfigError


@dataclass(frozen=True)
class Prune:
    """Remove all but the newest checkpoints of a run; no job may run there meanwhile.

    Whole checkpoints alone are counted. One whose manifest cannot be read is never removed.
    """

    folder: str = ""
    """Folder of a run."""
    keep: int = 2
    """Checkpoints that stay."""
    dry_run: bool = False
    """Say what would be removed, and remove nothing."""


def prune(asked: Prune) -> None:
    """Print a line for each checkpoint that goes."""
    if asked.keep < 1:
        raise ConfigError(f"prune must keep at least 1 checkpoint, not {asked.keep}")
    chosen = choose(asked.folder)
    if chosen.one:
        raise ConfigError(f"prune takes a run's folder, {chosen.run}, not that of one step")
    run = chosen.run
    work = run_folder.doomed if asked.dry_run else run_folder.prune
    with locked(run, ALONE):
        left = run_folder.unfinished(run)
        doomed = on_first(f"prune {run}", lambda: work(run, asked.keep), ALONE)
    for name in [*doomed, *left]:
        print(f"{'would remove' if asked.dry_run else 'removed'} {run / name}")
    print(f"{len(chosen.steps) - len(doomed)} {'would stay' if asked.dry_run else 'stay'} in {run}")
