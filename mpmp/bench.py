"""Measure what mpmp does beside what others do: ``mpirun -n 2 python -m mpmp.bench collectives``.

    collectives     every algorithm of every collective, and our choice among them, against the MPI
                    library's own and torch's gloo; a table of measurements to choose by
    train           whole training steps of the same model: one rank against a plain torch loop,
                    data against DDP, zero3 against FSDP2, tensor against DTensor, pipeline against
                    torch.distributed.pipelining
    generate        tokens/s of one process beside transformers' generate on the same weights
    checkpoint      saving beside what the disk can do, what of it steps wait for, and loading

``python -m mpmp.bench train --help`` tells the options.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mpmp import commands
from mpmp.errors import ConfigError
from mpmp.job.bench.checkpoint.settings import Checkpoints
from mpmp.job.bench.collectives.settings import Collectives
from mpmp.job.bench.generate.settings import GenerateTokens
from mpmp.job.bench.train.settings import TrainSteps
from mpmp.launcher import told_rank

COLLECTIVES = """Time every algorithm of every collective beside the MPI library's own.

A figure is the median over repeats of the slowest rank's time. Contenders take turns, so that noise
meets all of them; each is checked before it is timed. Ours is a prepared call that is replayed,
theirs the library's call on its own buffers. Bytes are those of the whole array; busbw is as
nccl-tests define it. Links' alpha, beta and gamma are fitted and held against the measurements.

Ends with 0, or with 1 where a result was wrong.

    mpirun -n 2 python -m mpmp.bench collectives --against native,gloo --csv rows.csv
    mpirun -n 2 python -m mpmp.bench collectives --table table.json    # choose by measurement:
    mpirun -n 2 python -m mpmp.train --comm.table table.json"""


TRAIN = """Time training steps beside torch on gloo: the same model, batch, precision and weights.

Both sides run in the same processes and take turns, so that noise meets them alike. Tokens/s are
those of all ranks together, by the median turn; the ratio is the median over pairs of turns; the
loss gap is the largest difference of the two losses of a step, over all steps. data is also held
against as many processes that know nothing of each other, tensor against one rank alone.

Ends with 0, or with 1 where losses differ by more than 2e-2 (bfloat16) or 1e-5 (float32).

    mpirun -n 2 python -m mpmp.bench train --csv rows.csv
    mpirun -n 2 python -m mpmp.bench train --modes data,tensor --dtype float32 --repeats 4"""


GENERATE = """Time generation on one rank beside transformers: the same GPT, prompt and weights.

Both sides continue one prompt by the likeliest tokens, keys and values kept, and take turns, so
that noise meets them alike. Tokens/s are new tokens over the whole call, the prompt's time
included, by the median turn; the ratio is the median over pairs of turns.

Ends with 0, or with 1 where the two sides say different tokens.

    python -m mpmp.bench generate --against transformers --csv rows.csv
    python -m mpmp.bench generate --sizes small --tokens 100 --repeats 15"""


CHECKPOINT = """Save and load a state of some size, and write the same bytes plainly beside.

Every rank writes its share; a time is that of the slowest rank. Ratios of least times: the save's
speed over the disk's; the time that a save in the background blocks over that of a save at once;
bytes read over bytes needed, where each rank loads a piece of what replicas have written.

    mpirun -n 2 python -m mpmp.bench checkpoint --folder /scratch/bench --megabytes 2000"""


def main() -> None:
    """Parse the command line, then measure; MPI is imported only in between."""
    with commands.guarded():
        name, arguments = _subcommand(sys.argv[1:])
        measure = SUBCOMMANDS[name](arguments)
    from mpmp.comm import ending

    ending.run(measure)


def _collectives(arguments: list[str]) -> Callable[[], None]:
    settings = commands.cli(
        Collectives, "mpmp.bench collectives", COLLECTIVES, arguments, Collectives()
    )
    from mpmp.job.bench.collectives.run import bench

    return lambda: bench(settings)


def _checkpoint(arguments: list[str]) -> Callable[[], None]:
    settings = commands.cli(
        Checkpoints, "mpmp.bench checkpoint", CHECKPOINT, arguments, Checkpoints()
    )
    from mpmp.job.bench.checkpoint.run import bench

    return lambda: bench(settings)


def _train(arguments: list[str]) -> Callable[[], None]:
    settings = commands.cli(TrainSteps, "mpmp.bench train", TRAIN, arguments, TrainSteps())
    from mpmp.job.bench.train.run import bench

    return lambda: bench(settings)


def _generate(arguments: list[str]) -> Callable[[], None]:
    settings = commands.cli(
        GenerateTokens, "mpmp.bench generate", GENERATE, arguments, GenerateTokens()
    )
    from mpmp.job.bench.generate.run import bench

    return lambda: bench(settings)


SUBCOMMANDS = {
    "collectives": _collectives,
    "checkpoint": _checkpoint,
    "train": _train,
    "generate": _generate,
}
"""Each reads its arguments and gives what is to be run."""


def _subcommand(arguments: list[str]) -> tuple[str, list[str]]:
    """The subcommand and its arguments; ends the process where help was asked for."""
    if arguments and arguments[0] in ("-h", "--help"):
        if told_rank() == 0:
            print(__doc__)
        sys.exit(0)
    if arguments and arguments[0] in SUBCOMMANDS:
        return arguments[0], arguments[1:]
    found = f"not {arguments[0]!r}" if arguments else "but was told nothing"
    raise ConfigError(
        f"mpmp.bench must be told what to measure, one of {', '.join(SUBCOMMANDS)}, {found}; "
        "usage: mpirun -n N python -m mpmp.bench train [options]"
    )


if __name__ == "__main__":
    main()
