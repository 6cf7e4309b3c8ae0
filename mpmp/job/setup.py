"""The beginning of every job: one world, one configuration, one mesh, one corpus."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World, start
from mpmp.config import Config, config_hash, to_dict
from mpmp.data.loader import Batches, Corpus, load
from mpmp.errors import ConfigError, LaunchError, MpmpError
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
    details = [_flat(json.loads(text)) for text in world.gather_texts(detail)]
    rank = strangers[0]
    difference = next(
        (
            f": {key} is {details[rank].get(key)!r} there and {value!r} on rank 0"
            for key, value in details[0].items()
            if details[rank].get(key) != value
        ),
        "",
    )
    raise LaunchError(
        f"rank {rank} has other {what} than rank 0{difference}; give all ranks the same"
    )


def make_mesh(config: Config, world: World) -> Mesh:
    """The mesh of the configuration's parallel section."""
    parallel = config.parallel
    return Mesh.over(
        world,
        data=parallel.data,
        pipeline=parallel.pipeline,
        tensor=parallel.tensor,
        settings=config.comm,
    )


def read_batches(config: Config, world: World) -> Batches:
    """Every rank's own reading of the corpus, seen to be the same everywhere."""
    corpus = load(config.data)
    agree(world, f"text in {corpus.name}", corpus.sha256)
    return make_batches(config, corpus)


def make_batches(config: Config, corpus: Corpus) -> Batches:
    return Batches(
        corpus,
        context=config.model.context,
        batch_size=config.train.batch,
        seed=config.data.seed,
        eval_batches=config.train.eval_batches,
    )


def on_rank_0(world: World, work: Any) -> Any:
    """Do something on rank 0 alone; its JSON-able result, or its error, on every rank."""
    answer: dict[str, Any] = {}
    error: MpmpError | None = None
    if world.rank == 0:
        try:
            answer = {"result": work()}
        except MpmpError as caught:
            error = caught
            answer = {"error": str(caught), "kind": type(caught).__name__}
    answer = json.loads(world.broadcast_text(json.dumps(answer)))
    if error is not None:
        raise error
    if "error" in answer:
        from mpmp import errors

        raise getattr(errors, answer["kind"])(answer["error"])
    return answer["result"]


def run_folder(config: Config, world: World, layout: str) -> Path:
    """The folder of the run, the same on all ranks; a used one is refused unless resumed."""

    def choose() -> str:
        settings = config.checkpoint
        if settings.dir is None:
            return f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{layout}_{os.getpid()}"
        folder = Path(settings.dir)
        if not settings.resume and any(folder.glob("step_*")):
            raise ConfigError(
                f"{folder} holds the checkpoints of another run; go on with it by "
                "--checkpoint.resume or choose another --checkpoint.dir"
            )
        return settings.dir

    return Path(on_rank_0(world, choose))


def fault_from_environment() -> Fault | None:
    return fault_of(os.environ.get("MPMP_FAULT"))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
