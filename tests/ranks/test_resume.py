"""Any layout goes on from any other: what is loaded to the bit, what follows to 1e-12."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpmp import checkpoint
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World
from mpmp.config import (
    Checkpoint,
    Config,
    Data,
    Model,
    Optimizer,
    Parallel,
    Train,
    parse_layout,
    to_dict,
)
from mpmp.data.loader import load
from mpmp.job import setup, state
from mpmp.job.training import Training

DENSE = Model(layers=4, heads=4, width=16, context=8, dropout=0.1)
SPARSE = replace(DENSE, layers=2, experts=4, tied=False)
HALF, ALL = 5, 10

PLAIN_OF_4 = ["dp4", "pp4", "tp4", "dp2.tp2", "pp2.tp2", "dp2.pp2"]
ZERO_OF_4 = ["dp4.zero1", "dp4.zero2", "dp4.zero3", "dp2.tp2.zero1", "dp2.pp2.zero3"]
LAYOUTS_OF_4 = [*PLAIN_OF_4, *ZERO_OF_4, "dp2.cp2.zero2", "cp2.tp2", "tp4.sp"]
EXPERTS_OF_4 = ["dp4.ep4", "tp4", "dp2.tp2.ep2", "pp2.tp2", "dp4.ep2.zero3"]
LAYOUTS_OF_3 = ["tp3", "dp3.zero1", "pp3", "dp3.zero3", "cp3", "dp3.zero2"]
"""Uneven on purpose: 3 divides neither heads, hidden units, vocabulary, layers nor the batch."""


@pytest.fixture
def run(tmp_path: Path, world: World) -> Path:
    """One folder for all ranks."""
    return Path(world.gather_texts(str(tmp_path))[0])


@pytest.fixture
def text(run: Path, world: World) -> Path:
    """The same file on all ranks."""
    path = run / "text.txt"
    if world.rank == 0:
        path.write_bytes(Path(argparse.__file__).read_bytes()[:30_000])
    world.comm.barrier()
    return path


class Trained:
    """A training in a layout, in float64."""

    def __init__(
        self, world: World, layout: str, model: Model, text: Path, cut: str = "even"
    ) -> None:
        axes: dict[str, Any] = {"data": None, **parse_layout(layout)}
        self.layout = layout
        self.config = Config(
            model=model,
            data=Data(path=str(text)),
            parallel=Parallel(**axes, bucket_mb=0.002, cut=cut),
            train=Train(batch=8, steps=ALL, dtype="float64"),
            optimizer=Optimizer(warmup_steps=2),
        )
        self.mesh = setup.make_mesh(self.config, world)
        objective = setup.make_objective(self.config, load(self.config.data))
        self.training = Training(self.config, self.mesh, objective)

    def steps(self, first: int, last: int) -> list[float]:
        return [self.training.step(number, number / ALL).loss for number in range(first, last)]

    def save(self, folder: Path) -> None:
        held = state.held(self.training)
        meta = {**state.meta(self.training), "config": to_dict(self.config)}
        checkpoint.save(folder, HALF, held, meta, self.mesh, 1)

    def resume(self, folder: Path) -> int:
        """Load, as a run does; the bytes this rank has read."""
        loaded = checkpoint.load(
            folder, lambda found: state.wanted(self.training, found), self.mesh
        )
        state.filled(self.training, loaded.meta)
        assert loaded.step == HALF and state.meta(self.training)["optimizer"] == {"updates": HALF}
        return loaded.read_bytes

    def digest(self) -> str:
        """Of all weights and moments, put together without the code under test."""
        return digest(merged(self.mesh, state.held(self.training)))


def merged(mesh: Mesh, held: Sequence[checkpoint.Held]) -> dict[str, Any]:
    """Whole tensors by key; replicas are seen to be alike and nothing to be missing."""
    own = [
        (one.key, one.shape, one.box, one.extent.start, one.extent.stop, one.tensor.numpy())
        for one in held
    ]
    whole: dict[str, Any] = {}
    for key, shape, box, start, stop, values in sum(mesh.world.comm.allgather(own), []):
        tensor = whole.setdefault(key, np.full(shape, np.nan))
        place = tuple(slice(*ends) for ends in box)
        flat = tensor[place].flatten()
        there = flat[start:stop]
        assert ((there == values.ravel()) | np.isnan(there)).all(), key
        flat[start:stop] = values.ravel()
        tensor[place] = flat.reshape(tensor[place].shape)
    assert not any(np.isnan(one).any() for one in whole.values())
    return whole


def digest(tensors: dict[str, Any]) -> str:
    sha = hashlib.sha256()
    for key in sorted(tensors):
        sha.update(f"{key} {tensors[key].shape}".encode() + tensors[key].tobytes())
    return sha.hexdigest()


def resume_each_in(
    world: World, run: Path, text: Path, layouts: Sequence[str], model: Model, every_pair: bool
) -> None:
    """Each layout saves; each goes on from the one before it, or from every one."""
    trained = [Trained(world, layout, model, text) for layout in layouts]
    unbroken, digests = [], []
    for one in trained:
        first = one.steps(0, HALF)
        one.save(run / one.layout)
        digests.append(one.digest())
        unbroken.append(first + one.steps(HALF, ALL))
    for number, one in enumerate(trained):
        origins = range(len(trained)) if every_pair else {number, number - 1}
        for origin in origins:
            name = f"{layouts[origin]} to {one.layout}"
            one.resume(run / layouts[origin])
            assert one.digest() == digests[origin], name
            losses = one.steps(HALF, ALL)
            if one.layout == layouts[origin]:
                assert losses == unbroken[origin][HALF:], name
            assert losses == pytest.approx(unbroken[origin][HALF:], rel=1e-12), name
    for one in trained:
        one.mesh.free()


@pytest.mark.ranks(4, timeout=120)
def test_4_ranks_go_on_in_another_layout(world: World, run: Path, text: Path) -> None:
    few = ["dp4", "pp4", "tp4", "dp2.pp2.zero3", "dp4.zero1", "dp2.cp2.zero2", "pp2.tp2"]
    resume_each_in(world, run, text, few, DENSE, every_pair=False)


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=900)
@pytest.mark.parametrize(
    "layouts, model", [(LAYOUTS_OF_4, DENSE), (EXPERTS_OF_4, SPARSE)], ids=["dense", "experts"]
)
def test_4_ranks_go_on_from_every_layout_in_every_layout(
    world: World, run: Path, text: Path, layouts: list[str], model: Model
) -> None:
    resume_each_in(world, run, text, layouts, model, every_pair=True)


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=300)
@pytest.mark.parametrize("before, after", [("dp4", "tp4"), ("tp4", "dp4"), ("dp4.zero3", "tp4")])
def test_4_ranks_together_read_what_they_need_once(
    world: World, run: Path, text: Path, before: str, after: str
) -> None:
    """Of 44 MB of weights and moments, in files of many blocks."""
    model = replace(DENSE, width=192)
    one, other = (Trained(world, layout, model, text) for layout in (before, after))
    one.steps(0, HALF)
    one.save(run / "run")
    saved = one.digest()
    read_bytes = world.comm.allreduce(other.resume(run / "run"))
    whole = merged(other.mesh, state.held(other.training))
    needed = sum(tensor.nbytes for tensor in whole.values())
    same = digest(whole) == saved
    for trained in (one, other):
        trained.mesh.free()
    assert same and needed > 40e6
    assert 1.0 <= read_bytes / needed <= 1.1, (read_bytes, needed)


@pytest.mark.ranks(3, timeout=120)
def test_3_ranks_with_uneven_pieces(world: World, run: Path, text: Path) -> None:
    resume_each_in(
        world, run, text, LAYOUTS_OF_3, replace(DENSE, heads=3, width=12), every_pair=False
    )


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize("layout", ["dp2.zero2", "pp2"])
def test_steps_go_on_while_a_save_is_written(
    world: World, run: Path, text: Path, layout: str
) -> None:
    """Ranks agree in the steps' own sums; what is there afterwards is the state of the copy."""
    one = Trained(world, layout, DENSE, text)
    saver = checkpoint.Saver(run / "run", one.mesh, 1, background=True)
    one.training.asked = saver.done
    one.steps(0, HALF)
    before = one.digest()
    saver.begin(HALF, state.held(one.training), state.meta(one.training))
    number, path = HALF, None
    while path is None and number < 1000:
        if one.training.step(number, 0.5).agreed:
            path = saver.settle()
        number += 1
    after = one.digest()
    one.resume(run / "run")
    assert path == run / "run" / "step_00000005" and number >= HALF + 2
    assert after != before == one.digest()
    one.mesh.free()


@pytest.mark.ranks(2)
def test_a_measured_cut_is_kept(world: World, run: Path, text: Path) -> None:
    one = Trained(world, "pp2", DENSE, text, cut="3,1")
    one.save(run / "run")
    parallel = replace(one.config.parallel, cut="measured")
    settings = Checkpoint(dir=str(run / "run"), resume=True)
    again = replace(one.config, parallel=parallel, checkpoint=settings)
    other = replace(again, parallel=replace(parallel, schedule="gpipe"))
    found = [state.with_saved_cut(c, run / "run", one.mesh).parallel.cut for c in (again, other)]
    one.mesh.free()
    assert found == ["3,1", "measured"]
