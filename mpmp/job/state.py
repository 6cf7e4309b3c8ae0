"""The state of a training as a checkpoint has it: tensors by global name, numbers in the meta.

What a rank updates is what it holds, whether the layout cut a box out of a parameter, or ZeRO an
interval out of the box. Data order and dropout are functions of the step and of seeds among the
settings, so that the step is the position of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mpmp import checkpoint
from mpmp.checkpoint import Found, Held
from mpmp.comm.mesh import Mesh
from mpmp.config import Config
from mpmp.job.training import Training

MOMENTS = ("exp_avg", "exp_avg_sq")
_UPDATES = "step"
"""What AdamW calls the number of its updates, which is the same for all parameters."""


def held(training: Training) -> list[Held]:
    """Weights and moments of this rank, in their own memory."""
    found = []
    for piece in training.pieces:
        states = training.optimizer.state.get(piece.parameter, {})
        tensors = {"weight": piece.parameter.detach(), **states}
        found += [
            Held.of(kind, piece.placement, one, piece.start, piece.stop)
            for kind, one in tensors.items()
            if kind != _UPDATES
        ]
    return found


def meta(training: Training) -> dict[str, Any]:
    """What is no tensor: updates taken, the loss scale, and how the layers were cut."""
    states = iter(training.optimizer.state.values())
    updates = int(next(states, {_UPDATES: 0})[_UPDATES])
    return {
        "optimizer": {"updates": updates},
        "scale": training.scale.state(),
        "cut": training.cut,
    }


def wanted(training: Training, found: Found) -> Sequence[Held]:
    """The tensors to be filled from a checkpoint; there are no moments before the first update."""
    updates = float(found.meta.get("optimizer", {}).get("updates", 0))
    training.optimizer.state.clear()
    if updates:
        for piece in training.pieces:
            one = piece.parameter
            moments = {kind: torch.zeros_like(one.detach()) for kind in MOMENTS}
            counted = torch.tensor(updates, dtype=torch.float32, device=one.device)
            training.optimizer.state[one] = {_UPDATES: counted, **moments}
    return held(training)


def filled(training: Training, meta: dict[str, Any]) -> None:
    """All ranks together, when the wanted tensors are there: go on from them."""
    training.scale.load(meta.get("scale", {}))
    training.sharded.step_done()


def with_saved_cut(config: Config, folder: Path, mesh: Mesh) -> Config:
    """On resuming with a measured cut, the settings with the saved one; all ranks together.

    What is measured again could be cut otherwise, and sums in another order have other last bits.
    """
    parallel = config.parallel
    if not config.checkpoint.resume or parallel.cut != "measured":
        return config
    found = checkpoint.newest(folder, mesh)
    before = found.meta.get("config", {}).get("parallel", {})
    alike = all(before.get(name) == getattr(parallel, name) for name in ("pipeline", "schedule"))
    if not alike or "cut" not in found.meta:
        return config
    return dataclasses.replace(
        config, parallel=dataclasses.replace(parallel, cut=found.meta["cut"])
    )
