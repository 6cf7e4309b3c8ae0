"""Measure what mpmp does beside what others do: ``mpirun -n 2 python -m mpmp.bench collectives``.

    collectives     every algorithm of every collective, and our choice among them, against the MPI
                    library's own and torch's gloo; a table of measurements to choose by

``python -m mpmp.bench collectives --help`` tells the options.
"""

from __future__ import annotations

import sys

from mpmp import commands
from mpmp.errors import ConfigError
from mpmp.job.bench.settings import Collectives
from mpmp.launcher import told_rank

SUBCOMMANDS = {"collectives": Collectives}
COLLECTIVES = """Time every algorithm of every collective beside the MPI library's own.

A figure is the median over repeats of the slowest rank's time. Contenders take turns, so that noise
meets all of them; each is checked before it is timed. Ours is a prepared call that is replayed,
theirs the library's call on its own buffers. Bytes are those of the whole array; busbw is as
nccl-tests define it. Links' alpha, beta and gamma are fitted and held against the measurements.

Ends with 0, or with 1 where a result was wrong.

    mpirun -n 2 python -m mpmp.bench collectives --against native,gloo --csv rows.csv
    mpirun -n 2 python -m mpmp.bench collectives --table table.json    # choose by measurement:
    mpirun -n 2 python -m mpmp.train --comm.table table.json"""


def main() -> None:
    """Parse the command line, then measure; MPI is imported only in between."""
    with commands.guarded():
        arguments = _after_subcommand(sys.argv[1:])
        settings = commands.cli(
            Collectives, "mpmp.bench collectives", COLLECTIVES, arguments, Collectives()
        )
    with commands.guarded():
        from mpmp.comm import ending
        from mpmp.job.bench.run import bench

    ending.run(lambda: bench(settings))


def _after_subcommand(arguments: list[str]) -> list[str]:
    """The arguments of the subcommand; ends the process where help was asked for."""
    if arguments and arguments[0] in ("-h", "--help"):
        if told_rank() == 0:
            print(__doc__)
        sys.exit(0)
    if arguments and arguments[0] in SUBCOMMANDS:
        return arguments[1:]
    found = f"not {arguments[0]!r}" if arguments else "but was told nothing"
    raise ConfigError(
        f"mpmp.bench must be told what to measure, one of {', '.join(SUBCOMMANDS)}, {found}; "
        "usage: mpirun -n N python -m mpmp.bench collectives [options]"
    )


if __name__ == "__main__":
    main()
