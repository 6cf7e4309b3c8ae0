"""Prove a layout: ``mpirun -n 8 python -m mpmp.verify --layout dp2.pp2.tp2``.

The same model is trained for some steps in the layout and in one process on rank 0, in float64;
loss, every gradient and every weight must agree to 1e-10. Ends with 0, or with 1 and the name of
the first tensor that is wrong. ``--layout all`` proves every factorisation of the ranks that were
started over data, pipeline, context and tensor; ``--suite`` also every schedule, ZeRO, sequence
parallelism, experts, every model, task and uneven case, and ``--table FILE`` writes down what it
found. ``--task tagging`` proves BERT on words and their tags in place of a language model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from mpmp import commands
from mpmp.config import Config, Model, Train
from mpmp.errors import ConfigError

LIMIT = 1e-10
STEPS = 3

DEFAULT = Config(
    model=Model(layers=8, heads=8, width=64, context=16, dropout=0.1),
    train=Train(batch=16, dtype="float64", steps=STEPS),
)
"""Small, with eight layers and eight heads, so that every cut of eight ranks exists."""

DEFAULTS = {
    "tagging": replace(DEFAULT, task="tagging", model=replace(DEFAULT.model, kind="bert")),
}
"""What the other tasks begin with."""


@dataclass(frozen=True)
class Asked:
    """What is to be proved: one layout, every factorisation, or the whole suite."""

    rows: str = "one"
    table: str | None = None


def main() -> None:
    """Parse the command line, then compare; MPI is imported only in between."""
    with commands.guarded():
        asked, arguments = _take_own(sys.argv[1:])
    config = commands.parse("mpmp.verify", __doc__ or "", DEFAULT, arguments, DEFAULTS)
    with commands.guarded():
        from mpmp.comm import ending

    ending.run(lambda: verify(config, asked))


def _take_own(arguments: list[str]) -> tuple[Asked, list[str]]:
    """What the flags that only this command has ask for, and the other arguments."""
    own, rest = commands.take(arguments, ("--table", "--layout"), ("--suite",))
    layout = own.get("--layout")
    rows = "suite" if "--suite" in own else "all" if layout == "all" else "one"
    if layout not in (None, "all"):
        rest += ["--layout", str(layout)]
    return Asked(rows, own.get("--table")), rest


def verify(config: Config, asked: Asked) -> None:
    """Compare what was asked for, and print a line for each."""
    from mpmp.job import proof, setup
    from mpmp.job.compare import Comparison, compare
    from mpmp.job.task import READERS

    if config.train.dtype != "float64":
        raise ConfigError(
            f"verify compares to {LIMIT:.0e}, which takes float64: leave out --train.dtype "
            f"{config.train.dtype}"
        )
    world = setup.begin(config)
    home = setup.make_mesh(config, world)
    tasks = {config.task: READERS[config.task](config, home)}
    named = [("", config)]
    if asked.rows != "one":
        tags = tasks[config.task].objective.tags
        factored = proof.factored(world.size, config, tags)
        rows = factored if asked.rows == "all" else list(proof.suite(world.size, config))
        if find_spec("tokenizers") is None and any(row.task == "tagging" for row in rows):
            rows = [row for row in rows if row.task != "tagging"]
            if world.rank == 0:
                print("verify leaves tagging out, which needs: pip install tokenizers", flush=True)
        named = [(str(row), row.of(config)) for row in rows]
    for _, one in named:  # what cannot be read is told before the first row
        if one.task not in tasks:
            tasks[one.task] = READERS[one.task](one, home)
    results: dict[str, Comparison] = {}
    for name, one in named:
        mesh = setup.make_mesh(one, world)
        objective = tasks[one.task].asked(one)
        result = compare(one, mesh, objective, one.train.steps or STEPS, LIMIT)
        results[name or mesh.layout] = result
        if world.rank == 0:
            print(
                f"verify {name or mesh.layout}: {result}   weights sha256 "
                f"{result.weights_sha256[:16]}   batches sha256 {result.batches_sha256[:16]}",
                flush=True,
            )
        mesh.free()
    home.free()
    if world.rank == 0 and asked.table is not None:
        proof.write_table(Path(asked.table), world.size, results, LIMIT)


if __name__ == "__main__":
    main()
