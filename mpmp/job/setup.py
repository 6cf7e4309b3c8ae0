"""The beginning of every job: one world, one configuration, one mesh, one corpus."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from mpmp.checkpoint.folder import step_folders
from mpmp.comm.agreement import on_first
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World, start
from mpmp.config import Config, config_hash, differences, to_dict
from mpmp.data.loader import Batches, Corpus, load
from mpmp.data.objective import LanguageObjective
from mpmp.errors import ConfigError, LaunchError
from mpmp.job.fault import Fault, fault_of


def begin(config: Config) -> World:
    """Start the world and see that all ranks were given the same settings."""
    world = start(config.train.device, config.comm.timeout_s)
    agree(world, "settings", config_hash(config), json.dumps(to_dict(config)))
    return world


def agree(world: World, what: str, digest: str, detail: str = "{}") -> None:
    """Raise LaunchError on all ranks where a digest differs from rank 0's."""
    digests = world.gather_texts(digest)
    strangers = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if not strangers:
        return
    details = [json.loads(text) for text in world.gather_texts(detail)]
    rank = strangers[0]
    found = next(iter(differences(details[0], details[rank]).items()), None)
    difference = ""
    if found is not None:
        name, (ours, theirs) = found
        difference = f": {name} is {theirs!r} there and {ours!r} on rank 0"
    raise LaunchError(
        f"rank {rank} has other {what} than rank 0{difference}; give all ranks the same"
    )


def make_mesh(config: Config, world: World) -> Mesh:
    """The mesh of the configuration's parallel section."""
    parallel = config.parallel
    return Mesh.over(
        world,
        **parallel.axes,
        zero=parallel.zero,
        sequence=parallel.sequence,
        settings=config.comm,
    )


def read_corpus(config: Config, world: World) -> Corpus:
    """Every rank's own reading of the text, seen to be the same everywhere."""
    corpus = load(config.data)
    agree(world, f"text in {corpus.name}", corpus.sha256)
    return corpus


def make_batches(config: Config, corpus: Corpus) -> Batches:
    return Batches(
        corpus,
        context=config.model.context,
        batch_size=config.train.batch,
        seed=config.data.seed,
        eval_batches=config.train.eval_batches,
    )


def make_objective(config: Config, corpus: Corpus) -> LanguageObjective:
    """What a language model of this kind is asked of a text."""
    return LanguageObjective(
        make_batches(config, corpus),
        masked=config.model.kind == "bert",
        shortest=config.data.shortest,
    )


def run_folder(config: Config, mesh: Mesh) -> Path:
    """The folder of the run, the same on all ranks; a used one is refused unless resumed."""

    def choose() -> str:
        settings = config.checkpoint
        if settings.dir is None:
            return f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{mesh.layout}_{os.getpid()}"
        folder = Path(settings.dir)
        if not settings.resume and folder.is_dir() and step_folders(folder):
            raise ConfigError(
                f"{folder} holds the checkpoints of another run; go on with it by "
                "--checkpoint.resume or choose another --checkpoint.dir"
            )
        return settings.dir

    return Path(on_first("look into the run's folder", choose, mesh))


def fault_from_environment() -> Fault | None:
    return fault_of(os.environ.get("MPMP_FAULT"))
