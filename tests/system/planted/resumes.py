"""Many resumptions in one job: ``resumes.py ARGUMENTS / FOLDER FOLDER ..``; each must be refused.

Rank 0 prints, for each folder, a line of JSON: what each rank said, with the error's exit code.
"""

from __future__ import annotations

import json
import sys

from mpmp import commands
from mpmp.comm import ending, world
from mpmp.config import Config
from mpmp.errors import MpmpError
from mpmp.job.run import train


def main() -> None:
    at = sys.argv.index("/")
    common, folders = sys.argv[1:at], sys.argv[at + 1 :]
    own = [["--checkpoint.resume", "--checkpoint.dir", folder] for folder in folders]
    configs = [commands.parse("mpmp.train", "", Config(), [*common, *one]) for one in own]

    def resumptions() -> None:
        for folder, config in zip(folders, configs, strict=True):
            try:
                train(config)
                said = "0 resumed"
            except MpmpError as error:
                said = f"{error.exit_code} {error}"
            every = world.start().gather_texts(said)
            if world.start().rank == 0:
                print(json.dumps([folder, every]), flush=True)

    ending.run(resumptions)


main()
