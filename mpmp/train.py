"""Train a language model on all ranks: ``mpirun -n N python -m mpmp.train``."""

from __future__ import annotations

import sys

from mpmp import commands
from mpmp.config import Config


def main() -> None:
    """Parse the command line, then train; MPI is imported only in between."""
    config = commands.parse("mpmp.train", __doc__ or "", Config(), sys.argv[1:])
    with commands.guarded():
        from mpmp.comm import ending
        from mpmp.job.run import train

    ending.run(lambda: train(config))


if __name__ == "__main__":
    main()
