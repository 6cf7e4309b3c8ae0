"""A trained model from wherever it lies: a run, one of its steps, a merged file, a foreign folder.

runs/a/                 the newest good step of a run
runs/a/step_00000500/   this one
some/model.safetensors  a merged model, or the folder that it lies in
gpt2/                   a Hugging Face folder: config.json, weights, tokenizer.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mpmp import checkpoint
from mpmp.checkpoint import Held, chosen, folder, huggingface, manifest
from mpmp.comm.agreement import together
from mpmp.config import Config, Data
from mpmp.errors import CheckpointError, ConfigError, InputOutputError
from mpmp.parallel.placement import Placement

if TYPE_CHECKING:  # a command asks for settings before MPI starts
    from mpmp.comm.mesh import Mesh

MERGED = "model.safetensors"
_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"


@dataclass(frozen=True)
class Trained:
    """A model that can be loaded, into any layout."""

    path: Path
    config: Config
    """Of the run that trained it, but for its layout; else what is known of the model."""
    is_run: bool
    """Of a run's steps the newest good one is taken."""
    is_step: bool

    @property
    def is_foreign(self) -> bool:
        """Whether it is a Hugging Face folder."""
        return (self.path / _CONFIG).exists()


def find(given: str) -> Trained:
    """The model at a path; any process for itself, nothing of the weights is read.

    Raises InputOutputError, CheckpointError or ConfigError where there is none.
    """
    path = Path(given)
    if not path.exists():
        raise InputOutputError(
            f"{given!r} does not exist; give the folder of a run, one of its steps, a merged "
            f"{MERGED} or a Hugging Face folder"
        )
    if path.is_dir() and (folder.step_folders(path) or (path / manifest.FILE).exists()):
        found = chosen.choose(given)
        _, newest = found.newest()
        config = _saved(newest.meta.get("config"), given)
        tokenizer = found.run / _TOKENIZER
        return Trained(path, _reading(config, tokenizer), not found.one, found.one)
    if path.is_dir() and not (path / _CONFIG).exists():
        if not (path / MERGED).exists():
            raise CheckpointError(
                f"{given} holds no step of a run, no {MERGED} and no {_CONFIG}; give the folder "
                "of a run, one of its steps, a merged model or a Hugging Face folder"
            )
        path = path / MERGED
    described = huggingface.describe(str(path))
    if described is None:
        raise ConfigError(
            f"{path} does not say what model it holds; merge the checkpoint again by python -m "
            "mpmp.checkpoint merge, or give the folder of the run"
        )
    config = Config(model=described.model, data=Data(tokenizer=described.tokenizer))
    return Trained(path, _reading(config, path.parent / _TOKENIZER), False, False)


def settings_of(given: str) -> Config:
    """What an evaluation begins with: the settings of the run, its ranks as replicas."""
    found = find(given).config
    if found.task == "tagging":
        raise ConfigError(
            f"{given} holds a tagger, whose report mpmp.train --task tagging writes; "
            "mpmp.evaluate takes models of text"
        )
    return found


def find_together(given: str, mesh: Mesh) -> Trained:
    """The same on all ranks, which fail alike."""
    found: list[Trained] = []
    together(f"open {given}", lambda: found.append(find(given)), mesh)
    return found[0]


def weights(parameters: Iterable[tuple[Placement, nn.Parameter]]) -> list[Held]:
    """The weights of a rank, to be filled."""
    return [Held.of("weight", placement, one.detach()) for placement, one in parameters]


def fill(trained: Trained, held: Sequence[Held], mesh: Mesh) -> tuple[str, ...]:
    """Fill a rank's weights, all ranks together; sentences to show."""
    path, model = trained.path, trained.config.model
    if trained.is_run:
        loaded = checkpoint.load(path, lambda found: held, mesh)
        return (f"loaded {loaded.path}", *loaded.skipped)
    if trained.is_step:
        contents = checkpoint.look_at(path, mesh).contents
        checkpoint.read_step(path, contents, held, mesh)
        return (f"loaded {path}",)
    return (f"loaded {path}", *huggingface.load_folder(str(path), held, mesh, model))


def _saved(said: Any, where: str) -> Config:
    """The settings of a run as its checkpoint has them, without those of its ranks."""
    try:
        sections = {
            name: type(one)(**said[name])
            for name, one in vars(Config()).items()
            if name in ("model", "data", "optimizer", "train")
        }
        model = dataclasses.replace(sections.pop("model"), weights=None)
        return Config(task=said.get("task", "language"), model=model, **sections)
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{where} tells of its model what this mpmp does not understand ({error!s:.200})"
        ) from None


def _reading(config: Config, tokenizer: Path) -> Config:
    """With the tokenizer that lies beside the weights, if there is one."""
    if not tokenizer.exists():
        return config
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, tokenizer=str(tokenizer))
    )
