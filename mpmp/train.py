"""Train a model on all ranks: ``mpirun -n N python -m mpmp.train``.

A language model on text, or with --task tagging BERT on words and their tags in CoNLL files.
``--dry-run`` trains nothing: it builds the layout of a world in one process (``--ranks N``;
omitted: the ranks that the axes make) and shows the parameters, memory and bytes sent of each rank.
"""

from __future__ import annotations

import sys

from mpmp import commands
from mpmp.config import TASKS, Config
from mpmp.errors import ConfigError


def main() -> None:
    """Parse the command line, then train; MPI is imported only in between."""
    with commands.guarded():
        dry, ranks, arguments = _take_own(sys.argv[1:])
    config = commands.parse("mpmp.train", __doc__ or "", Config(), arguments, TASKS)
    if dry:
        with commands.guarded():
            from mpmp.job.dry_run import dry_run

            dry_run(config, ranks)
        return
    with commands.guarded():
        from mpmp.comm import ending
        from mpmp.job.run import train

    ending.run(lambda: train(config))


def _take_own(arguments: list[str]) -> tuple[bool, int | None, list[str]]:
    """Whether this is a dry run, of how many ranks, and the other arguments."""
    own, rest = commands.take(arguments, ("--ranks",), ("--dry-run",))
    dry, said = "--dry-run" in own, own.get("--ranks")
    if said is None:
        return dry, None, rest
    if not said.isdecimal() or int(said) < 1:
        raise ConfigError(f"--ranks needs a number of ranks, not {said!r}")
    if not dry:
        raise ConfigError(
            "--ranks goes with --dry-run; the ranks of a run are those that mpirun starts"
        )
    return dry, int(said), rest


if __name__ == "__main__":
    main()
