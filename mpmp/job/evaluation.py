"""The command ``mpmp.evaluate``: a trained model's loss on a text's validation split."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path

from mpmp import config
from mpmp.checkpoint import Held
from mpmp.comm.agreement import on_first
from mpmp.comm.mesh import Mesh
from mpmp.data.baselines import bits_per_byte
from mpmp.data.objective import LanguageObjective
from mpmp.errors import ConfigError
from mpmp.job import loaded, setup
from mpmp.job.report import Reporter
from mpmp.job.training import Training


@dataclass(frozen=True)
class Asked:
    """What flags of this command alone ask for."""

    checkpoint: str
    json: str | None = None


def evaluate(settings: config.Config, asked: Asked) -> None:
    """Load the model in any layout, validate, and say what was found."""
    world = setup.begin(settings)
    mesh = setup.make_mesh(settings, world)
    report = Reporter(world.rank == 0, every=1)
    trained = loaded.find_together(asked.checkpoint, mesh)
    _require_same(trained.config.model, settings.model, asked.checkpoint)
    objective = setup.make_objective(settings, setup.read_corpus(settings, world))
    # Weights of other files than a run's are what a training begins from that is not resumed.
    begins = replace(settings, model=trained.config.model, checkpoint=config.Checkpoint())
    training = Training(_with_batch(begins, mesh), mesh, objective)
    for line in training.notes:
        report.line(line)
    if trained.is_run or trained.is_step:
        for line in loaded.fill(trained, _weights(training), mesh):
            report.line(line)
        training.sharded.step_done()
    figures = _figures(training.validate(), objective)
    name = objective.batches.corpus.name
    report.line(f"text: {name}, {objective.scored():,} tokens of its validation split")
    words = {"nats": f"nats per {'masked ' * objective.masked}token"}
    report.line(
        f"{mesh.layout}: "
        + ", ".join(
            f"{words.get(key, key.replace('_', ' '))} {x:.4f}" for key, x in figures.items()
        )
    )
    if asked.json is not None:
        told = {"checkpoint": asked.checkpoint, "layout": mesh.layout, **figures}
        told |= {"text": name, "text_sha256": objective.batches.corpus.sha256}
        path, text = Path(asked.json), json.dumps(told | {"tokens": objective.scored()}, indent=1)
        on_first(f"write {path}", lambda: path.write_text(text + "\n", encoding="utf-8"), mesh)


def _weights(training: Training) -> list[Held]:
    """What this rank has of the weights, whatever ZeRO has left it."""
    return [
        Held.of("weight", one.placement, one.parameter.detach(), one.start, one.stop)
        for one in training.pieces
    ]


def _figures(nats: float, objective: LanguageObjective) -> dict[str, float]:
    """By name; of masked words there are no bits of the text."""
    found = {"nats": nats, "perplexity": _perplexity(nats)}
    if not objective.masked:
        found["bits_per_byte"] = bits_per_byte(nats, objective.batches)
    return found


def _perplexity(nats: float) -> float:
    return exp(nats) if nats < 700 else float("inf")


def _with_batch(settings: config.Config, mesh: Mesh) -> config.Config:
    """A step is not taken, and no layout is refused for a batch that is too small for one."""
    rows = mesh.data.size * (settings.parallel.microbatches or 2 * mesh.pipeline.size)
    batch = max(settings.train.batch, rows)
    return replace(settings, train=replace(settings.train, batch=batch, compile=False))


def _require_same(saved: config.Model, asked: config.Model, given: str) -> None:
    """ConfigError where a flag asks for another model than the one that is there."""
    for name, there in vars(saved).items():
        here = getattr(asked, name)
        if here != there and name not in ("weights", "seed", "dropout", "balance"):
            raise ConfigError(
                f"{given} holds a model with {name} {there!r}, and --model.{name} asks for "
                f"{here!r}; leave it out"
            )
