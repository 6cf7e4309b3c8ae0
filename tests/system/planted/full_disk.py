"""A training whose last rank cannot write its second shard: ``full_disk.py HOW ARGUMENTS``.

HOW is "limit" (the kernel lets no file of the process grow beyond 50 KB) or "fill:FILE" (a file on
the same disk takes all room that is left), from the beginning of the second save on.
"""

from __future__ import annotations

import resource
import sys

from mpmp import commands
from mpmp.checkpoint import points
from mpmp.comm import ending, world
from mpmp.config import Config
from mpmp.job.run import train


def fill(path: str) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def main() -> None:
    how, _, path = sys.argv[1].partition(":")
    config = commands.parse("mpmp.train", "", Config(), sys.argv[2:])
    saves = 0

    def strike(name: str) -> None:
        nonlocal saves
        saves += name == "before shards"
        if name == "before shards" and saves == 2 and world.start().rank == world.start().size - 1:
            if how == "limit":
                most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
            else:
                fill(path)

    points.hook = strike
    ending.run(lambda: train(config))


main()
