"""The stages of this rank, put together from a configuration on a mesh."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mpmp import models
from mpmp.comm.mesh import Mesh
from mpmp.config import Config
from mpmp.errors import LayoutError
from mpmp.job import setup
from mpmp.models.stage import TransformerStage
from mpmp.parallel.deferred import Deferred
from mpmp.parallel.parts import measure_costs, parts
from mpmp.parallel.stage import Microbatch, Part
from mpmp.programs import schedules
from mpmp.programs.steps import Schedule

Arithmetic = Callable[[], AbstractContextManager[object]]
"""The context of a forward: an autocast, or nothing."""


@dataclass(frozen=True)
class Assembly:
    """The schedule of the pipeline, and this rank's stages in the order of its chunks."""

    schedule: Schedule
    stages: list[TransformerStage]
    cut: str
    """Layers of each stage, as parallel.cut takes them."""


def assemble(
    config: Config,
    mesh: Mesh,
    vocabulary: int,
    example: Callable[[], Microbatch],
    tags: int = 0,
) -> Assembly:
    """Build what this rank holds of the model; ``example`` gives what layers are measured with.

    ``tags`` makes a classifier of tokens of as many tags.

    Raises LayoutError or ConfigError, on every rank alike, for what cannot be combined.
    """
    parallel, train = config.parallel, config.train
    schedule = schedules.find(parallel.schedule)
    if parallel.schedule.endswith(".csv"):  # two orders would hang
        sha256 = hashlib.sha256(Path(parallel.schedule).read_bytes()).hexdigest()
        setup.agree(mesh.world, f"schedule in {parallel.schedule}", sha256)
    refuse(config, mesh, vocabulary, schedule, tags)
    dtype = torch.float64 if train.dtype == "float64" else torch.float32

    deferred = Deferred()

    def build(part: Part, embedding: torch.nn.Module | None = None) -> TransformerStage:
        return models.build(
            config.model,
            vocabulary,
            mesh,
            dtype,
            part,
            sequence=parallel.sequence,
            attention=parallel.attention,
            recompute=train.recompute,
            compile=train.compile,
            embedding=embedding,
            transient=parallel.zero == 3,
            tags=tags,
            deferred=deferred,
        )

    costs = None
    if parallel.cut == "measured":
        costs = measure_costs(build, example(), mesh, arithmetic(config, mesh))
    pipeline = mesh.pipeline
    every = [
        parts(schedule, rank, pipeline.size, config.model.layers, parallel.cut, costs)
        for rank in range(pipeline.size)
    ]
    layers = {part.number: part.layers[1] - part.layers[0] for own in every for part in own}
    stages: list[TransformerStage] = []
    for part in every[pipeline.rank]:
        # The ends of the pipeline may meet on one rank, which then has one table for both.
        first = next((stage for stage in stages if stage.embedding is not None), None)
        stages.append(build(part, first.embedding if first is not None and part.last else None))
    cut = ",".join(str(layers[number]) for number in sorted(layers))
    return Assembly(schedule, stages, cut)


def arithmetic(config: Config, mesh: Mesh) -> Arithmetic:
    """The precision that forwards compute in."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if config.train.dtype not in dtypes:
        return nullcontext
    return partial(torch.autocast, mesh.world.device.type, dtype=dtypes[config.train.dtype])


def refuse(config: Config, mesh: Mesh, vocabulary: int, schedule: Schedule, tags: int = 0) -> None:
    """LayoutError or ConfigError for combinations that cannot be, with the reason."""
    parallel = config.parallel
    models.refuse(config, mesh, vocabulary, splits=schedule.splits, tags=tags)
    rows = config.train.batch // mesh.data.size
    schedule.demand(mesh.pipeline.size, parallel.num_microbatches(rows))
    if parallel.expert > 1 and config.model.experts < parallel.expert:
        raise LayoutError(
            f"layout {mesh.layout} shares {config.model.experts} experts over {parallel.expert} "
            "ranks; use at most as many ranks as model.experts"
        )
