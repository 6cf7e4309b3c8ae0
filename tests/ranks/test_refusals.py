"""What is refused, because it would end in a wrong sum, a hang, or in nothing at all."""

from __future__ import annotations

import gc

import pytest
import torch

import mpmp
from mpmp.comm.mesh import Mesh
from mpmp.config import Comm
from mpmp.errors import ConfigError, PeerError, TensorError


@pytest.fixture(scope="module")
def group(world):
    mesh = mpmp.mesh(tensor=world.size)
    yield mesh.tensor
    mesh.free()


@pytest.mark.parametrize("algorithm", ("auto", "ring"))
@pytest.mark.parametrize("shift", (-16, 16, 500_000))
def test_out_that_overlaps_its_input(group, algorithm, shift):
    """Long enough to pass in pieces: the first results would stand where input is still to come."""
    memory = torch.arange(2_000_000.0)
    x, out = memory[500_000:1_500_000], memory[500_000 + shift : 1_500_000 + shift]
    with pytest.raises(TensorError, match="overlaps"):
        group.allreduce(x, algorithm=algorithm, out=out)
    expected = group.size * x
    assert torch.equal(group.allreduce(x, algorithm=algorithm, out=x), expected)


def test_out_that_holds_the_input_at_its_place_and_at_another(group):
    size, rank = group.size, group.rank
    whole = torch.full((3 * size,), float(rank))
    own = whole[3 * rank : 3 * rank + 3]
    group.allgather(own, out=whole)
    assert whole.tolist() == [float(one) for one in range(size) for _ in range(3)]
    group.reduce_scatter(whole, out=own)
    assert own.tolist() == [float(rank * size)] * 3
    if size > 1:
        other = whole[3 * ((rank + 1) % size) :][:3]
        with pytest.raises(TensorError, match="overlaps"):
            group.allgather(other, out=whole)
        with pytest.raises(TensorError, match="overlaps"):
            group.reduce_scatter(whole, out=other)


def test_tensors_that_can_be_listed_once_are_all_reduced(group):
    tensors = [torch.ones(3), torch.ones(2, 2)]
    found = group.allreduce(one for one in tensors)
    assert [one.tolist() for one in found] == [(group.size * one).tolist() for one in tensors]
    group.prepare_allreduce(one for one in tensors).run()
    assert all(bool((one == group.size).all()) for one in tensors)


def test_tensors_of_a_list_are_looked_at_one_by_one(group):
    good, turned = torch.ones(3, 4), torch.ones(4, 3).t()
    for call in (
        lambda: group.allreduce([good, turned]),
        lambda: group.allreduce([good], out=[turned]),
        lambda: group.allreduce([good], out=[good.clone().requires_grad_()]),
        lambda: group.prepare_allreduce([good, turned]),
    ):
        with pytest.raises(TensorError, match=r"contiguous|requires grad"):
            call()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("other", (torch.float32, torch.float16))
def test_dtypes_that_travel_alike(group, other):
    """All travel in float32: the sums would be right, and not the same on all ranks."""
    x = torch.ones(1001, dtype=other if group.rank else torch.bfloat16)
    with pytest.raises(TensorError, match="disagree.*bfloat16 in float32"):
        group.allreduce(x, algorithm="ring")


@pytest.mark.ranks(2, 3)
def test_functions_without_a_name_of_their_own(group):
    first = lambda a, b: a + b  # noqa: E731
    second = lambda a, b: a * b  # noqa: E731
    with pytest.raises(TensorError, match="disagree.*lambda"):
        group.allreduce(torch.ones(3), op=second if group.rank else first, algorithm="ring")


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (Comm(windows="off"), "windows"),
        (Comm(allreduce="ring"), "allreduce"),
        (Comm(table="nowhere.json"), "table"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_meshes_that_differ(world, settings, name):
    with pytest.raises(ConfigError, match=f"same mesh: {name} is .* on rank 0, .* on rank 1"):
        Mesh.over(world, settings=settings if world.rank == 1 else Comm())
    with pytest.raises(ConfigError, match="same mesh: layout"):
        Mesh.over(world, **({"data": world.size} if world.rank == 1 else {"tensor": world.size}))


def test_what_was_prepared_on_a_mesh_that_was_freed(world):
    """Without its requests a run would do nothing, and leave what is no sum."""
    mesh = mpmp.mesh(tensor=world.size)
    prepared = mesh.tensor.prepare_allreduce(torch.ones(1000), algorithm="ring")
    prepared.run()
    mesh.free()
    for call in (prepared.run, lambda: prepared.start().wait()):
        with pytest.raises(TensorError, match="freed"):
            call()


@pytest.mark.ranks(2)
def test_a_group_that_gave_up_in_the_middle(world):
    """What comes late of the old messages would be taken for that of the next ones."""
    mesh = Mesh.over(world, settings=Comm(windows="off"))
    group, x = mesh.everyone, torch.ones(4)
    group.broadcast(x, root=1, algorithm="binomial")
    limit, world.limit_s = world.limit_s, 1.2
    try:
        if world.rank == 0:
            with pytest.raises(PeerError, match="timeout_s"):
                group.broadcast(x, root=1, algorithm="binomial")
    finally:
        world.limit_s = limit
    mesh.world.gather_texts("both are here")
    if world.rank == 1:
        group.broadcast(x, root=1, algorithm="binomial")
    else:
        for y in (x, torch.ones(3), torch.ones(3)):
            with pytest.raises(PeerError, match="gave up in the middle"):
                group.allreduce(y, algorithm="ring")


@pytest.mark.parametrize("algorithm", ("window", "one_shot", "two_shot"))
def test_what_was_prepared_in_windows_and_freed(group, algorithm):
    prepared = group.prepare_allreduce(torch.ones(1000), algorithm=algorithm)
    prepared.run()
    prepared.free()
    for call in (prepared.run, prepared.start):
        with pytest.raises(TensorError, match="freed"):
            call()
    assert group.allreduce(torch.ones(3)).tolist() == [group.size] * 3


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("shared", (True, False))
def test_a_prepared_sum_whose_function_raised(world, shared):
    """The next run would go on in the middle, with what the others have not written yet."""
    mesh = mpmp.mesh(tensor=world.size)
    group, fails = mesh.tensor, [True]
    x = group.empty((1000,), torch.float32) if shared else torch.empty(1000)

    def add(a, b):
        if fails[0]:
            raise ValueError("planted")
        return a + b

    prepared = group.prepare_allreduce(x.fill_(1.0), op=add, algorithm="window")
    with pytest.raises(ValueError, match="planted"):
        prepared.run()
    fails[0] = False
    world.gather_texts("all have raised")
    for call in (prepared.run, lambda: prepared.start().wait()):
        with pytest.raises(PeerError, match="gave up in the middle"):
            call()


def test_a_mesh_that_was_freed_leaves_no_memory_behind(world):
    """Nor where what was prepared on it is let go of afterwards."""
    kept = len(world.shares.kept)
    for _ in range(2):
        mesh = mpmp.mesh(tensor=world.size)
        prepared = mesh.tensor.prepare_allreduce(torch.ones(1000), algorithm="one_shot")
        prepared.run()
        mesh.free()
        del prepared, mesh
    gc.collect()
    assert len(world.shares.kept) == kept
