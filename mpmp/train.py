"""Train a model on all ranks: ``mpirun -n N python -m mpmp.train``.

A language model on text, or with --task tagging BERT on words and their tags in CoNLL files.
"""

from __future__ import annotations

import sys

from mpmp import commands
from mpmp.config import TASKS, Config


def main() -> None:
    """Parse the command line, then train; MPI is imported only in between."""
    config = commands.parse("mpmp.train", __doc__ or "", Config(), sys.argv[1:], TASKS)
    with commands.guarded():
        from mpmp.comm import ending
        from mpmp.job.run import train

    ending.run(lambda: train(config))


if __name__ == "__main__":
    main()
