"""Saving and loading by all ranks together: every layout, and one rank's trouble told to all."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mpmp.checkpoint import Held, Saver, export, load, locked, save
from mpmp.checkpoint.extents import Box, lengths
from mpmp.comm.mesh import Mesh
from mpmp.comm.world import World
from mpmp.errors import CheckpointError, InputOutputError
from mpmp.programs.partition import factorisations, partition

ROWS, COLUMNS = 37, 1001


@pytest.fixture
def run(tmp_path: Path, world: World) -> Path:
    """One folder for all ranks."""
    return Path(world.gather_texts(str(tmp_path))[0]) / "run"


def meshes(world: World) -> Iterator[Mesh]:
    for data, pipeline, tensor in factorisations(world.size, 3):
        yield Mesh.over(world, data=data, pipeline=pipeline, tensor=tensor)


def values(number: int, step: int) -> torch.Tensor:
    """A whole tensor."""
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) + number + step


def boxes(mesh: Mesh) -> Iterator[tuple[int, Box]]:
    """This rank's tensors: shared out over the stages, and cut over the tensor axis, unevenly."""
    index, sizes = mesh.index, mesh.sizes
    for number in range(*partition(5, sizes["pipeline"])[index["pipeline"]]):
        lines, columns = (0, ROWS), (0, COLUMNS)
        if number % 3 == 0:
            lines = partition(ROWS, sizes["tensor"])[index["tensor"]]
        if number % 3 == 1:
            columns = partition(COLUMNS, sizes["tensor"])[index["tensor"]]
        yield number, (lines, columns)


def content(mesh: Mesh, step: int | None) -> list[Held]:
    """What this rank has of a step; of none: room for it."""
    found = []
    for number, box in boxes(mesh):
        shape = lengths(box)
        tensor = torch.full(shape, -1.0) if step is None else cut(values(number, step), box)
        found.append(Held(f"weight/{number}", (ROWS, COLUMNS), box, tensor))
    return found


def cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(*ends) for ends in box)].clone()


def load_step(folder: Path, mesh: Mesh) -> tuple[int, tuple[str, ...], int]:
    """The step that was loaded and is whole on this rank, what was skipped, and bytes read."""
    held = content(mesh, None)
    loaded = load(folder, lambda _: held, mesh)
    wanted = content(mesh, loaded.step)
    same = all(torch.equal(a.tensor, b.tensor) for a, b in zip(held, wanted, strict=True))
    return loaded.step if same else -1, loaded.skipped, loaded.read_bytes


def damage(path: Path) -> str:
    """Flip one bit in the first shard; its name."""
    file = sorted(path.glob("shard_*"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    file.write_bytes(data)
    return file.name


def same_on_all(mesh: Mesh, text: str) -> bool:
    return len(set(mesh.world.gather_texts(text))) == 1


def one_mesh(world: World) -> Mesh:
    """Two stages of tensor ranks where that is possible: several shards, several hosts' worth."""
    pipeline = 2 if world.size % 2 == 0 else 1
    return Mesh.over(world, data=1, pipeline=pipeline, tensor=world.size // pipeline)


def test_every_layout_comes_back_in_every_layout(world: World, run: Path) -> None:
    """Each rank writes a part, and all ranks together read each byte once."""
    every = list(meshes(world))
    for mesh in every:
        folder = run / mesh.layout
        with locked(folder, mesh):
            for step in (10, 20, 30):
                path = save(folder, step, content(mesh, step), {"at": step}, mesh, keep=2)
            found = [load_step(folder, other) for other in every]
            sizes = sorted(file.stat().st_size for file in path.glob("shard_*"))
            steps = sorted(one.name for one in folder.glob("step_*"))
            mesh.everyone.barrier()
        read = mesh.everyone.allreduce(torch.tensor([one[2] for one in found])).tolist()
        assert all(one[:2] == (30, ()) for one in found), mesh.layout
        assert len(sizes) == world.size and sum(sizes) < 5 * 4 * ROWS * COLUMNS + 4000 * world.size
        assert all(one == sum(sizes) for one in read), (mesh.layout, sizes, read)
        assert steps == ["step_00000020", "step_00000030"]
        if mesh.sizes["data"] == world.size:
            assert sizes[-1] - sizes[0] < 1000, sizes
    for mesh in every:
        mesh.free()


def test_only_what_is_needed_is_read(world: World, run: Path) -> None:
    """Of two tensors the one; all ranks want the same columns of it, or each its own rows."""
    mesh = Mesh.over(world, data=world.size)
    shape = (3000, 1000)
    big = torch.arange(3_000_000, dtype=torch.float32).view(shape)
    held = [Held.whole("exp_avg/x", -big), Held.whole("weight/x", big)]
    save(run, 1, held, {}, mesh, keep=1)
    read = []
    for box in ((partition(3000, world.size)[world.rank], (0, 1000)), ((0, 3000), (7, 900))):
        part = torch.empty(lengths(box))
        loaded = load(run, lambda _, box=box, part=part: [Held("weight/x", shape, box, part)], mesh)
        read.append(int(mesh.everyone.allreduce(torch.tensor([loaded.read_bytes]))))
        assert torch.equal(part, cut(big, box))
    mesh.free()
    # Blocks of 1 MiB are read whole, at most one more at each end of each file's piece.
    assert all(one <= 4 * 3_000_000 + (2 << 20) for one in read), read


def test_damage_makes_all_fall_back(world: World, run: Path) -> None:
    mesh = one_mesh(world)
    for step in (10, 20):
        path = save(run, step, content(mesh, step), {}, mesh, keep=2)
    name = damage(path) if world.rank == 0 else ""
    mesh.everyone.barrier()
    step, skipped, _ = load_step(run, mesh)
    assert step == 10 and same_on_all(mesh, repr(skipped)) and len(skipped) == 1
    assert skipped[0].startswith("step_00000020: shard_") and "SHA-256" in skipped[0]
    assert world.rank > 0 or name in skipped[0]


def test_no_step_that_is_good(world: World, run: Path) -> None:
    mesh = one_mesh(world)
    for step in (10, 20):
        path = save(run, step, content(mesh, step), {}, mesh, keep=9)
        if world.rank == world.size - 1:
            damage(path)
    mesh.everyone.barrier()
    with pytest.raises(CheckpointError, match="no good checkpoint in") as caught:
        load_step(run, mesh)
    assert same_on_all(mesh, str(caught.value))
    assert "step_00000010: " in str(caught.value) and "step_00000020: " in str(caught.value)


def test_one_ranks_other_model_is_every_ranks_error(world: World, run: Path) -> None:
    mesh = one_mesh(world)
    save(run, 10, content(mesh, 10), {}, mesh, keep=2)
    other = [Held.whole("weight/0", torch.zeros(3))] if world.rank == world.size - 1 else []
    with pytest.raises(CheckpointError, match="another model: weight/0") as caught:
        load(run, lambda _: other, mesh)
    assert same_on_all(mesh, str(caught.value))


def test_nothing_there_is_said_on_all(world: World, run: Path) -> None:
    mesh = one_mesh(world)
    with pytest.raises(CheckpointError, match="no checkpoint in") as caught:
        load_step(run, mesh)
    assert same_on_all(mesh, str(caught.value))


@pytest.mark.parametrize("background", [False, True])
def test_one_ranks_full_disk_is_every_ranks_error(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    mesh = one_mesh(world)
    save(run, 10, content(mesh, 10), {}, mesh, keep=2)
    victim = world.size - 1

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver = Saver(run, mesh, 2, background=background)
    with monkeypatch.context() as patch:
        if world.rank == victim:
            patch.setattr(os, "fsync", full)
        saver.begin(20, content(mesh, 20), {})
        with pytest.raises(InputOutputError) as caught:
            saver.finish()
    mesh.everyone.barrier()
    left = sorted(os.listdir(run))
    step, *_ = load_step(run, mesh)
    told = same_on_all(mesh, str(caught.value))
    saver.begin(20, content(mesh, 20), {})
    path = saver.finish()
    again, *_ = load_step(run, mesh)
    assert told and caught.value.exit_code == 74
    assert f"rank {victim} could not write" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert left == ["latest", "step_00000010"] and step == 10
    assert again == 20 and path == run / "step_00000020"


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
