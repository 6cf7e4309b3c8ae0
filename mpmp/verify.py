"""Prove a layout: ``mpirun -n 8 python -m mpmp.verify --layout dp2.pp2.tp2`` (or ``--layout all``).

The same model is trained for some steps in the layout and in one process on rank 0, in float64;
loss, every gradient and every weight must agree to 1e-10. Ends with 0, or with 1 and the name of
the first tensor that is wrong. ``all`` proves every factorisation of the ranks that were started.
"""

from __future__ import annotations

import dataclasses
import sys

from mpmp import commands
from mpmp.config import Config, Model, Train
from mpmp.programs.partition import factorisations

LIMIT = 1e-10
STEPS = 3

DEFAULT = Config(
    model=Model(layers=8, heads=8, width=64, context=16, dropout=0.1),
    train=Train(batch=16, dtype="float64", steps=STEPS),
)
"""Small, with eight layers and eight heads, so that every cut of eight ranks exists."""


def main() -> None:
    """Parse the command line, then compare; MPI is imported only in between."""
    every, arguments = _take_all(sys.argv[1:])
    config = commands.parse("mpmp.verify", __doc__ or "", DEFAULT, arguments)
    with commands.guarded():
        from mpmp.comm import ending

    ending.run(lambda: verify(config, every))


def _take_all(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether ``--layout all`` is among the arguments, and the others."""
    for at, argument in enumerate(arguments):
        for words in (["--layout=all"], ["--layout", "all"]):
            if argument == words[0] and arguments[at : at + len(words)] == words:
                return True, arguments[:at] + arguments[at + len(words) :]
    return False, arguments


def verify(config: Config, every: bool) -> None:
    """Compare one layout, or all that the world and the model allow, and print a line for each."""
    from mpmp.job import setup
    from mpmp.job.compare import compare

    world = setup.begin(config)
    batches = setup.read_batches(config, world)
    for one in _layouts(config, world.size) if every else [config]:
        mesh = setup.make_mesh(one, world)
        result = compare(one, mesh, batches, one.train.steps or STEPS, LIMIT)
        if world.rank == 0:
            print(
                f"verify {result.layout}: {result}   weights sha256 {result.weights_sha256[:16]}"
                f"   batches sha256 {result.batches_sha256[:16]}",
                flush=True,
            )
        mesh.free()


def _layouts(config: Config, world: int) -> list[Config]:
    model = config.model
    return [
        dataclasses.replace(
            config,
            parallel=dataclasses.replace(
                config.parallel, data=data, pipeline=pipeline, tensor=tensor
            ),
        )
        for data, pipeline, tensor in factorisations(world, 3)
        if pipeline <= model.layers and tensor <= model.heads
    ]


if __name__ == "__main__":
    main()
