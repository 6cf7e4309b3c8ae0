"""A step cut again for another layout, in one process: each rank's shard as a job would write it.

    files of dp4 |====|====|     for each rank of tp2: which boxes would it hold?
                    \\/ \\/        imagined meshes say so; only that rank's parts are in memory
    files of tp2 |====|====|

Any layout loads any other; a layout that finds its own files reads each one on one rank, whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpmp import models
from mpmp.checkpoint import folder as run_folder
from mpmp.checkpoint.alone import ALONE
from mpmp.checkpoint.blocks import write_file
from mpmp.checkpoint.chosen import choose
from mpmp.checkpoint.contents import Stored
from mpmp.checkpoint.extents import Extent
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.huggingface import copy_tokenizer
from mpmp.checkpoint.loading import read_step
from mpmp.checkpoint.locking import locked
from mpmp.checkpoint.manifest import Manifest
from mpmp.checkpoint.saving import last_serial, publish, shard_name
from mpmp.checkpoint.shard import in_place
from mpmp.checkpoint.sharing import Holding, share_out, size_of, stored
from mpmp.comm.agreement import on_first
from mpmp.comm.imagined import imagined
from mpmp.comm.mesh import Mesh
from mpmp.config import Model, Parallel
from mpmp.errors import CheckpointError, ConfigError
from mpmp.parallel import zero
from mpmp.parallel.parts import parts
from mpmp.programs import schedules


@dataclass(frozen=True)
class Reshard:
    """Write a step anew, with the files of another layout; no bit of a tensor changes.

    Of a run the newest step is taken. Resume from the new folder with --checkpoint.resume.
    """

    folder: str = ""
    """Folder of a run, or of one step."""
    layout: str = ""
    """The layout to cut for, as in dp2.tp2.zero3."""
    to: str = ""
    """Folder of a run, new or not, that gets the step."""


def reshard(asked: Reshard) -> None:
    """Read what each rank of the layout would write, and write it, one rank after the other."""
    if not (asked.layout and asked.to):
        raise ConfigError("reshard needs a layout and a folder: --layout dp2.tp2.zero3 --to DIR")
    chosen = choose(asked.folder)
    path, found = chosen.newest()
    for sentence in chosen.bad():
        print(f"passed over: {sentence}")
    settings = _settings(path, found)
    meshes = list(imagined(asked.layout))
    every = [_holdings(mesh, settings, found) for mesh in meshes]
    to, layout = Path(asked.to), meshes[0].layout

    def work() -> str:
        name = cut_anew(path, found, every, to, layout)
        copy_tokenizer(chosen.run, to)
        return name

    with locked(to, ALONE):
        name = on_first(f"reshard {path}", work, ALONE)
    print(f"{path} of {found.layout} is {to / name} of {layout}")


def cut_anew(
    path: Path, found: Manifest, every: Sequence[Sequence[Holding]], to: Path, layout: str
) -> str:
    """Save a step in another run's folder as ranks that hold ``every`` would; the new name."""
    shares, contents = share_out(every), found.contents(path)
    tensors = stored(shares, (one for own in every for one in own))
    if _shapes(tensors) != _shapes(found.tensors):
        raise CheckpointError(f"{path} holds other tensors than its settings tell of")
    name = run_folder.free_name(to, found.step)
    unfinished = to / f"{name}.tmp"
    unfinished.mkdir()
    try:
        run_folder.require_room(unfinished, size_of(shares), shutil.disk_usage(unfinished).free)
        files = {}
        for rank, share in enumerate(shares):
            if share is not None:
                held = [_empty(one) for one, _ in share.pieces]
                read_step(path, contents, held, ALONE)
                files[shard_name(rank)] = write_file(
                    unfinished / shard_name(rank), in_place(share, held)
                )
        meta = {key: one for key, one in found.meta.items() if key != "cut"}
        publish(to, name, Manifest(found.step, last_serial(to) + 1, layout, files, tensors, meta))
    except BaseException:
        run_folder.remove(unfinished)
        raise
    return name


def _shapes(tensors: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    return {key: one.shape for key, one in tensors.items()}


def _empty(one: Holding) -> Held:
    """Room for what a rank holds."""
    extent = one.extent
    room = torch.empty(extent.size, dtype=one.dtype)
    return Held(one.key, one.shape, extent.box, room, extent.start, extent.stop)


# --- who would hold what --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What of a run's settings says who holds what."""

    model: Model
    parallel: Parallel
    dtype: torch.dtype
    vocabulary: int
    tags: int


def _settings(path: Path, found: Manifest) -> _Settings:
    try:
        said: dict[str, Any] = found.meta["config"]
        model = Model(**said["model"])
        parallel = Parallel(**{**said["parallel"], "cut": found.meta.get("cut", "even")})
        words = found.tensors["weight/embedding.weight"]
        vocabulary, tags = words.shape[0], len(found.meta.get("tags") or ())
        if not words.dtype.is_floating_point:
            raise TypeError(f"weights of {words.dtype}")
    except (LookupError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{path} does not say how its model is made ({error!r:.200}), so it cannot be cut anew"
        ) from None
    return _Settings(model, parallel, words.dtype, vocabulary, tags)


def _pieces(mesh: Mesh, settings: _Settings) -> list[zero.Piece]:
    """What a rank of the layout would update of each parameter: shapes alone, no memory."""
    model, parallel, pipeline = settings.model, settings.parallel, mesh.pipeline
    schedule = schedules.find(parallel.schedule)
    stages = schedule.chunks * pipeline.size
    cut = parallel.cut if parallel.cut.count(",") + 1 == stages else "even"
    made: list[models.TransformerStage] = []
    with torch.device("meta"):
        for part in parts(schedule, pipeline.rank, pipeline.size, model.layers, cut):
            first = next((stage for stage in made if stage.embedding is not None), None)
            made.append(
                models.build(
                    model,
                    settings.vocabulary,
                    mesh,
                    settings.dtype,
                    part,
                    sequence=mesh.sequence,
                    attention=parallel.attention,
                    embedding=first.embedding if first is not None and part.last else None,
                    transient=mesh.zero == 3,
                    tags=settings.tags,
                )
            )
        bucket_mb = parallel.bucket_mb
        bucket_bytes = None if bucket_mb is None else bucket_mb * 1e6
        return zero.make(made, mesh, mesh.zero, bucket_bytes).pieces()


def _holdings(mesh: Mesh, settings: _Settings, found: Manifest) -> list[Holding]:
    """What a rank would hold of each tensor of a checkpoint: weights and their optimiser states."""
    kinds: dict[str, list[str]] = {}
    for key in found.tensors:
        kind, _, name = key.partition("/")
        kinds.setdefault(name, []).append(kind)
    return [
        Holding(
            f"{kind}/{piece.placement.name}",
            found.tensors[f"{kind}/{piece.placement.name}"].dtype,
            piece.placement.shape,
            Extent(piece.placement.ranges, piece.start, piece.stop),
        )
        for piece in _pieces(mesh, settings)
        for kind in kinds.get(piece.placement.name, ())
    ]
