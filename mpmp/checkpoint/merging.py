"""The whole model of a step as one safetensors file, as other programs read it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mpmp.checkpoint.alone import ALONE
from mpmp.checkpoint.chosen import choose
from mpmp.checkpoint.exporting import export
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.loading import read_step
from mpmp.checkpoint.merged import metadata
from mpmp.errors import ConfigError


@dataclass(frozen=True)
class Merge:
    """Write the weights of a step, whatever its layout, as one model.safetensors.

    Of a run the newest step is taken. Blocks are compared with their hashes as they are read.
    """

    folder: str = ""
    """Folder of a run, or of one step."""
    to: str | None = None
    """File to write; omitted: model.safetensors in the run's folder, where there is none yet."""


def merge(asked: Merge) -> None:
    """Read the weights, each tensor whole, and write them; needs memory for one model."""
    chosen = choose(asked.folder)
    path, found = chosen.newest()
    target = Path(asked.to) if asked.to is not None else chosen.run / "model.safetensors"
    if asked.to is None and os.path.lexists(target):
        raise ConfigError(f"{target} is there already; name another file with --to")
    if target.is_dir():
        raise ConfigError(
            f"--to {target} is a folder; name the file, as in --to {target / 'model.safetensors'}"
        )
    for sentence in chosen.bad():
        print(f"passed over: {sentence}")
    prefix = "weight/"
    weights = {
        key: torch.empty(one.shape, dtype=one.dtype)
        for key, one in found.tensors.items()
        if key.startswith(prefix)
    }
    held = [Held.whole(key, one) for key, one in weights.items()]
    read_step(path, found.contents(path), held, ALONE)
    merged = {key.removeprefix(prefix): one for key, one in sorted(weights.items())}
    export(target, merged, metadata(found.step, found.meta), ALONE)
    size = sum(one.nbytes for one in merged.values())
    print(f"merged {len(merged)} tensors ({size / 1e6:,.2f} MB) of {path} into {target}")
