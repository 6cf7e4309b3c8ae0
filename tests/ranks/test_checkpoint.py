"""Saving and loading by all ranks together: every layout, and one rank's trouble told to all."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mpmp.checkpoint import export, load, locked, save
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World
from mpmp.errors import CheckpointError, InputOutputError, LayoutError
from mpmp.programs.partition import factorisations


@pytest.fixture
def run(tmp_path: Path, world: World) -> Path:
    """One folder for all ranks."""
    return Path(world.gather_texts(str(tmp_path))[0]) / "run"


def meshes(world: World) -> Iterator[Mesh]:
    for data, pipeline, tensor in factorisations(world.size, 3):
        yield Mesh.over(world, data=data, pipeline=pipeline, tensor=tensor)


def content(mesh: Mesh, step: int) -> dict[str, Tensor]:
    """Tensors that differ by stage and tensor rank, in length too, and are alike on replicas."""
    place = 10 * mesh.index["pipeline"] + mesh.index["tensor"]
    return {
        f"stage{mesh.index['pipeline']}.weight": torch.arange(1000.0 + place) + 0.5 * step,
        "half": torch.full((place, 3), step + place, dtype=torch.bfloat16),
        "step": torch.tensor(step),
    }


def holds(tensors: dict[str, Tensor], mesh: Mesh, step: int) -> bool:
    wanted = content(mesh, step)
    return tensors.keys() == wanted.keys() and all(
        tensors[name].dtype == one.dtype and torch.equal(tensors[name], one)
        for name, one in wanted.items()
    )


def damage(path: Path, mesh: Mesh) -> None:
    """Flip one bit in this rank's shard."""
    place = f"pp{mesh.index['pipeline']:03}_tp{mesh.index['tensor']:03}"
    file = path / f"shard_{place}.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    file.write_bytes(data)


def same_on_all(mesh: Mesh, text: str) -> bool:
    return len(set(mesh.world.gather_texts(text))) == 1


def one_mesh(world: World) -> Mesh:
    """Two stages of tensor ranks where that is possible: several shards, several hosts' worth."""
    pipeline = 2 if world.size % 2 == 0 else 1
    return Mesh.over(world, data=1, pipeline=pipeline, tensor=world.size // pipeline)


def test_every_layout_comes_back_on_every_rank(world: World, run: Path) -> None:
    for mesh in meshes(world):
        folder = run / mesh.layout
        with locked(folder, mesh):
            for step in (10, 20, 30):
                path = save(folder, step, content(mesh, step), {"position": step}, mesh, keep=2)
            loaded = load(folder, mesh)
            shards = sorted(file.name for file in path.glob("shard_*"))
            steps = sorted(one.name for one in folder.glob("step_*"))
            mesh.everyone.barrier()
        assert loaded.step == 30 and loaded.meta == {"position": 30} and loaded.skipped == ()
        assert holds(loaded.tensors, mesh, 30)
        assert len(shards) == mesh.sizes["pipeline"] * mesh.sizes["tensor"]
        assert steps == ["step_00000020", "step_00000030"]


def test_another_layout_is_refused_on_all(world: World, run: Path) -> None:
    first, *others = meshes(world)
    save(run, 1, content(first, 1), {}, first, keep=1)
    said = []
    for mesh in others:
        with pytest.raises(LayoutError, match=rf"{first.layout}.*{mesh.layout}") as caught:
            load(run, mesh)
        said.append(str(caught.value))
    assert all(same_on_all(first, text) for text in said)


def test_damage_on_any_rank_makes_all_fall_back(world: World, run: Path) -> None:
    mesh = one_mesh(world)
    for victim in range(world.size):
        folder = run / str(victim)
        for step in (10, 20):
            path = save(folder, step, content(mesh, step), {}, mesh, keep=2)
        if world.rank == victim:
            damage(path, mesh)
        mesh.everyone.barrier()
        loaded = load(folder, mesh)
        told = same_on_all(mesh, repr(loaded.skipped))
        assert loaded.step == 10 and holds(loaded.tensors, mesh, 10) and told
        assert f"step_00000020 on rank {victim}: shard_" in loaded.skipped[0]


def test_no_step_that_is_good_on_all(world: World, run: Path) -> None:
    """Each step is good on all ranks but one, another one each time."""
    mesh = one_mesh(world)
    for step in range(world.size):
        path = save(run, step, content(mesh, step), {}, mesh, keep=9)
        if world.rank == step:
            damage(path, mesh)
    mesh.everyone.barrier()
    with pytest.raises(CheckpointError, match="no good checkpoint in") as caught:
        load(run, mesh)
    assert same_on_all(mesh, str(caught.value))
    assert all(f"on rank {rank}" in str(caught.value) for rank in range(world.size))


def test_nothing_there_is_said_on_all(world: World, run: Path) -> None:
    mesh = one_mesh(world)
    with pytest.raises(CheckpointError, match="no checkpoint in") as caught:
        load(run, mesh)
    assert same_on_all(mesh, str(caught.value))


def test_one_ranks_full_disk_is_every_ranks_error(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = one_mesh(world)
    save(run, 10, content(mesh, 10), {}, mesh, keep=2)
    victim = world.size - 1

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if world.rank == victim:
            patch.setattr(os, "fsync", full)
        with pytest.raises(InputOutputError) as caught:
            save(run, 20, content(mesh, 20), {}, mesh, keep=2)
    mesh.everyone.barrier()
    left = sorted(os.listdir(run))
    loaded = load(run, mesh)
    told = same_on_all(mesh, str(caught.value))
    save(run, 20, content(mesh, 20), {}, mesh, keep=2)
    again = load(run, mesh)
    assert told and caught.value.exit_code == 74
    assert f"rank {victim} could not write" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert left == ["latest", "step_00000010"] and loaded.step == 10
    assert again.step == 20 and holds(again.tensors, mesh, 20)


def test_a_second_job_is_refused_on_all(world: World, run: Path) -> None:
    mesh = one_mesh(world)
    refused = pytest.raises(InputOutputError, match="another job")
    with locked(run, mesh), refused as caught, locked(run, mesh):
        pass
    assert same_on_all(mesh, str(caught.value))
    with locked(run, mesh):
        pass


def test_export_and_its_failure_on_all(world: World, run: Path) -> None:
    mesh = one_mesh(world)
    merged = {"x": torch.arange(5.0)} if world.rank == 0 else {}
    export(run / "model.safetensors", merged, {"steps": "3"}, mesh)
    with safe_open(str(run / "model.safetensors"), "pt") as file:
        found = file.get_tensor("x")
    with pytest.raises(InputOutputError, match="rank 0 could not write /dev/null/model") as caught:
        export(Path("/dev/null/model"), merged, {}, mesh)
    assert same_on_all(mesh, str(caught.value))
    assert torch.equal(found, torch.arange(5.0))
