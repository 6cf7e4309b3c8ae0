"""Ranks that were never started hold what those that were hold."""

from __future__ import annotations

import pytest
import torch

from mpmp import models
from mpmp.comm.imagined import imagined
from mpmp.comm.mesh import Mesh
from mpmp.config import Model
from mpmp.parallel import zero
from mpmp.parallel.parts import parts
from mpmp.programs import schedules
from mpmp.programs.partition import factorisations

MODEL = Model(layers=4, heads=4, width=16, context=8, experts=4)


def held(mesh: Mesh) -> list[tuple[object, ...]]:
    """What a rank updates, and which of it is counted on it."""
    axes, stages = mesh.pipeline, []
    for part in parts(schedules.find("1f1b"), axes.rank, axes.size, MODEL.layers):
        stages.append(models.build(MODEL, 61, mesh, torch.float32, part, transient=mesh.zero == 3))
    pieces = zero.make(stages, mesh, mesh.zero, 3000).pieces()
    return [(one.placement, one.start, one.stop, one.counts, one.parameter.dtype) for one in pieces]


@pytest.mark.slow
@pytest.mark.parametrize("stage", (0, 3))
def test_every_rank_of_a_layout_holds_what_was_imagined(world, stage):
    same = []
    for data, pipeline, tensor in factorisations(world.size, 3):
        axes = {"data": data, "pipeline": pipeline, "tensor": tensor}
        mesh = Mesh.over(world, **axes, expert=data, zero=stage)
        ours = held(mesh)
        others = list(imagined(mesh.layout))
        with torch.device("meta"):
            told = held(others[world.rank])
        same.append((mesh.layout, ours == told and len(others) == world.size))
        mesh.free()
    assert all(holds for _, holds in same), same
