"""Several trainings in one job: ``several.py FIRST ARGUMENTS / SECOND ARGUMENTS / ..``.

Starting four ranks takes longer than a small training, and nothing of one is left for the next.
"""

from __future__ import annotations

import sys

from mpmp import commands
from mpmp.comm import ending
from mpmp.config import TASKS, Config
from mpmp.job.run import train


def main() -> None:
    lines: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "/":
            lines.append([])
        else:
            lines[-1].append(word)
    configs = [commands.parse("mpmp.train", "", Config(), line, TASKS) for line in lines]

    def trainings() -> None:
        for config in configs:
            train(config)

    ending.run(trainings)


main()
