"""Experts on every axis against the one-file definition, and the movements they travel by."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import mpmp
from mpmp.comm.mesh import Mesh
from mpmp.models.experts_reference import ReferenceExperts
from mpmp.parallel.expert import Experts, Places, alltoall
from mpmp.parallel.maker import Maker
from mpmp.parallel.placement import placement_of
from mpmp.parallel.recompute import recomputed
from mpmp.programs.partition import partition
from mpmp.programs.sequence import cut_sequence, positions

WIDTH, HIDDEN, TIME = 6, 10, 7
ROWS = 5

LAYOUTS = {
    "expert": lambda n: {"data": n, "expert": n},
    "tensor": lambda n: {"tensor": n},
    "context": lambda n: {"context": n},
    "data": lambda n: {"data": n},
}


def close(ours, theirs):
    scale = max(float(theirs.abs().max()), 1e-3)
    assert float((ours - theirs).abs().max()) <= 1e-12 * scale


def check(world, axes, *, sequence, experts, top_k, capacity, gated, lengths):
    mesh = mpmp.mesh(**axes)
    activation = F.silu if gated else F.gelu
    settings = {"experts": experts, "top_k": top_k, "capacity": capacity}
    made = {"balance": 0.3, "std": 0.6, "residual_std": 0.4}

    def layer(mesh, sequence):
        make = Maker(mesh, seed=3, dtype=torch.float64, sequence=sequence)
        shape = {"activation": activation, "gated": gated}
        return Experts(make, "mlp", WIDTH, HIDDEN, **settings, **made, **shape)

    ours, whole = layer(mesh, sequence), layer(Mesh.single(world), False)
    theirs = ReferenceExperts(WIDTH, HIDDEN, activation=activation, gated=gated, **settings)
    theirs = theirs.double()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(getattr(whole, name))

    generator = torch.Generator().manual_seed(8)
    x_BTD = torch.randn(ROWS, TIME, WIDTH, dtype=torch.float64, generator=generator)
    g_BTD = torch.randn(ROWS, TIME, WIDTH, dtype=torch.float64, generator=generator)
    lengths_B = torch.tensor([7, 1, 4, 6, 2]) if lengths else None
    expected = x_BTD.clone().requires_grad_()
    y_BTD, loss = theirs(expected, lengths_B)
    ((y_BTD * g_BTD).sum() + 0.3 * loss).backward()

    low, high = partition(ROWS, mesh.data.size)[mesh.replica]
    cut = cut_sequence(TIME, mesh.context.size, "ring", True)[mesh.context.rank]
    positions_t = torch.tensor(positions(cut), dtype=torch.int64)
    first, last = 0, len(positions_t)
    if sequence:
        first, last = partition(last, mesh.tensor.size)[mesh.tensor.rank]
    places = Places(
        TIME,
        positions_t,
        positions_t[first:last],
        None if lengths_B is None else lengths_B[low:high],
    )
    own = (slice(low, high), places.positions_u)
    x_BuD = x_BTD[own].clone().requires_grad_()
    y_BuD, extra = ours(x_BuD, places)
    ((y_BuD * g_BTD[own]).sum() + extra).backward()

    close(y_BuD.detach(), y_BTD[own].detach())
    close(x_BuD.grad, expected.grad[own])
    # Replicated on the tensor group where each of its ranks has all tokens.
    parts = extra.detach() if sequence or mesh.tensor.rank == 0 else torch.zeros_like(extra)
    close(mesh.everyone.allreduce(parts), 0.3 * loss.detach())
    for name, parameter in ours.named_parameters():
        placement = placement_of(parameter)
        total = mesh.sum_group(placement).allreduce(parameter.grad)
        piece = tuple(slice(start, stop) for start, stop in placement.ranges)
        close(total, getattr(theirs, name).grad[piece])
    mesh.free()


@pytest.mark.parametrize("lengths", (False, True))
@pytest.mark.parametrize("capacity", (0.0, 0.6))
@pytest.mark.parametrize("axis", LAYOUTS)
def test_experts_are_those_of_the_definition(world, axis, capacity, lengths):
    axes = LAYOUTS[axis](world.size)
    for experts, top_k, gated in ((5, 2, False), (4, 1, True)):
        for sequence in (False, True) if axis == "tensor" and world.size > 1 else (False,):
            check(
                world,
                axes,
                sequence=sequence,
                experts=experts,
                top_k=top_k,
                capacity=capacity,
                gated=gated,
                lengths=lengths,
            )


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "axes",
    (
        {"data": 2, "expert": 2, "tensor": 2},
        {"data": 4, "expert": 2},
        {"data": 2, "expert": 2, "context": 2},
        {"context": 2, "tensor": 2},
    ),
    ids=str,
)
def test_axes_compose(world, axes):
    sequence = axes.get("tensor", 1) > 1
    settings = {"experts": 3, "top_k": 2, "capacity": 0.8, "gated": True, "lengths": True}
    check(world, axes, sequence=sequence, **settings)


def test_the_all_to_all_has_the_adjoint_it_claims(world):
    group = mpmp.mesh(data=world.size).data
    there = [(group.rank + 2 * to) % 3 for to in range(group.size)]
    every = group.allgather(torch.tensor([there])).tolist()
    here = [theirs[group.rank] for theirs in every]
    generator = torch.Generator().manual_seed(group.rank)
    x = torch.randn(sum(there), 3, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randn(sum(here), 3, dtype=torch.float64, generator=generator)
    moved = alltoall(x, group, there, here)
    moved.backward(y)
    products = torch.stack([(moved * y).sum(), (x * x.grad).sum()]).detach()
    forward, backward = group.allreduce(products).tolist()
    assert abs(forward - backward) <= 1e-12 * max(abs(forward), 1)


@pytest.mark.ranks(1)
def test_a_full_expert_takes_first_choices_and_early_tokens(world):
    """All tokens want the same expert, which has room for two of eight choices."""
    make = Maker(Mesh.single(world), seed=1, dtype=torch.float64)
    layer = Experts(
        make, "mlp", 2, 3, experts=2, top_k=1, capacity=0.5, balance=0.0, std=1.0,
        residual_std=1.0, activation=F.gelu,
    )  # fmt: skip
    with torch.no_grad():
        layer.router.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    places = Places(8, torch.arange(8), torch.arange(8))
    y_BTD, extra = layer(torch.ones(1, 8, 2, dtype=torch.float64), places)
    assert extra is None
    assert (y_BTD[0, :2] != 0).any(-1).all() and (y_BTD[0, 2:] == 0).all()


@pytest.mark.ranks(1)
def test_a_split_backward_knows_weights_that_are_computed_again(world):
    make = Maker(Mesh.single(world), seed=1, dtype=torch.float64)
    layer = Experts(
        make, "mlp", 2, 3, experts=2, top_k=1, capacity=0, balance=0.0, std=1.0, residual_std=1.0,
        activation=F.gelu,
    )  # fmt: skip
    x = torch.ones(1, 4, 2, dtype=torch.float64, requires_grad=True)
    make.deferred.begin()
    y, _ = recomputed(layer, x, Places(4, torch.arange(4), torch.arange(4)))
    y.sum().backward()
    kept = make.deferred.end()
    assert [one for one, _ in kept][0] is layer.down and [one for one, _ in kept][1] is layer.up
    for one, compute in kept:
        gradient = compute()
        assert gradient.shape == one.shape and not gradient.requires_grad
