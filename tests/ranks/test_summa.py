"""Linear layers that are cut in two dims equal plain torch on every grid, cut evenly or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpmp
from mpmp.parallel import summa as rooms
from mpmp.parallel.maker import Maker
from mpmp.parallel.merge import merge
from mpmp.parallel.placement import placed_parameters
from mpmp.parallel.summa import Grid, SummaLinear, summa
from mpmp.programs.partition import factorisations, partition

LIMIT = 1e-12
TOKENS = 6


@pytest.fixture(scope="module")
def meshes(world):
    """The grids of this many ranks: (1, 4), (2, 2), (4, 1)."""
    return [mpmp.mesh(context=q, tensor=r) for q, r in factorisations(world.size, 2)]


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def piece(x, *groups):
    """This rank's piece of each dim that a group cuts."""
    for dim, group in enumerate(groups):
        if group is not None:
            start, stop = partition(x.shape[dim], group.size)[group.rank]
            x = x.narrow(dim, start, stop - start)
    return x.contiguous()


@pytest.mark.parametrize(("inputs", "outputs"), ((8, 8), (7, 5), (5, 9), (2, 3)))
def test_products_and_both_gradients_are_those_of_the_whole(meshes, inputs, outputs):
    x, weight = randn(TOKENS, 2, inputs), randn(outputs, inputs, seed=1)
    grad = randn(TOKENS, 2, outputs, seed=2)
    whole_x, whole_weight = (one.clone().requires_grad_() for one in (x, weight))
    expected = F.linear(whole_x, whole_weight)
    expected.backward(grad)
    for mesh in meshes:
        down, across = mesh.context, mesh.tensor
        own_x = piece(x, down, None, across).requires_grad_()
        own_weight = piece(weight, across, down).requires_grad_()
        y = summa(own_x, own_weight, Grid(down, across), inputs)
        y.backward(piece(grad, down, None, across))
        for found, whole in (
            (y, piece(expected, down, None, across)),
            (own_x.grad, piece(whole_x.grad, down, None, across)),
            (own_weight.grad, piece(whole_weight.grad, across, down)),
        ):
            assert found.shape == whole.shape
            assert torch.allclose(found, whole, rtol=LIMIT, atol=LIMIT), mesh.layout


def adjoint_errors(mesh):
    """Of the product as an operator on x, and as one on W: each element lies on one rank."""
    down, across, everyone = mesh.context, mesh.tensor, mesh.everyone

    def inner(a, b):
        return float(everyone.allreduce((a * b).sum().view(1)))

    x = piece(randn(TOKENS, 7), down, across).requires_grad_()
    weight = piece(randn(5, 7, seed=1), across, down).requires_grad_()
    y = summa(x, weight, Grid(down, across), 7)
    other = torch.randn(y.shape, dtype=torch.float64)  # each rank its own
    left = inner(y.detach(), other)
    rights = (
        inner(one.detach(), back)
        for one, back in zip((x, weight), torch.autograd.grad(y, (x, weight), other), strict=True)
    )
    return [abs(left - right) / max(abs(left), abs(right)) for right in rights]


def test_backward_is_the_adjoint_for_inputs_and_for_weights(meshes, world):
    torch.manual_seed(world.rank)
    for mesh in meshes:
        assert max(adjoint_errors(mesh)) <= LIMIT, mesh.layout


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("wrong", (0, 1), ids=("inputs", "weights"))
def test_a_wrong_backward_is_found(meshes, monkeypatch, wrong):
    right = rooms._Summa.backward

    def scaled(ctx, grad):
        found = list(right(ctx, grad))
        found[wrong] = found[wrong] / 2
        return tuple(found)

    monkeypatch.setattr(rooms._Summa, "backward", staticmethod(scaled))
    for mesh in meshes:
        assert adjoint_errors(mesh)[wrong] > 1e-3


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "none"))
def test_a_layer_of_the_grid_learns_as_a_plain_one(meshes, bias):
    x, grad = randn(TOKENS, 7), randn(TOKENS, 5, seed=2)
    for mesh in meshes:
        down, across = mesh.context, mesh.tensor
        make = Maker(mesh, seed=3, dtype=torch.float64)
        layer = SummaLinear(make, "layer", 7, 5, std=0.5, bias=bias)
        if bias:
            layer.bias.data += 0.1
        layer(piece(x, down, across)).backward(piece(grad, down, across))
        weights = merge({p.name: (p, one.detach()) for p, one in placed_parameters(layer)}, mesh)
        gradients = merge(
            {
                p.name: (p, mesh.sum_group(p).allreduce(one.grad))
                for p, one in placed_parameters(layer)
            },
            mesh,
        )
        held = sum(one.numel() for one in layer.parameters())
        most = -(-5 // across.size) * (-(-7 // down.size) + bias)
        assert held <= most
        if mesh.world.rank == 0:
            plain = {name: nn.Parameter(one) for name, one in weights.items()}
            F.linear(x, plain["layer.weight"], plain.get("layer.bias")).backward(grad)
            assert len(gradients) == 1 + bias
            for name, one in plain.items():
                assert torch.allclose(gradients[name], one.grad, rtol=LIMIT, atol=LIMIT), name


@pytest.mark.ranks(1, 4)
def test_initial_weights_do_not_depend_on_the_grid(meshes):
    found = []
    for mesh in meshes:
        layer = SummaLinear(Maker(mesh, 3, torch.float64), "layer", 7, 5, std=0.5)
        shards = {p.name: (p, one.detach()) for p, one in placed_parameters(layer)}
        found.append(merge(shards, mesh))
    if meshes[0].world.rank == 0:
        assert all(torch.equal(one["layer.weight"], found[0]["layer.weight"]) for one in found)


@pytest.mark.ranks(4)
def test_16_bits_are_those_of_autocast(meshes):
    for mesh in meshes:
        x = piece(randn(TOKENS, 8), mesh.context, mesh.tensor).float().requires_grad_()
        weight = piece(randn(8, 8, seed=1), mesh.tensor, mesh.context).float().requires_grad_()
        grid = Grid(mesh.context, mesh.tensor)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = summa(x, weight, grid, 8)
        y.sum().backward()
        assert y.dtype is torch.bfloat16
        assert x.grad.dtype is weight.grad.dtype is torch.float32
        assert torch.allclose(y.float(), summa(x, weight, grid, 8), atol=0.1)


@pytest.mark.ranks(1, 2)
def test_what_is_frozen_costs_no_gradient(meshes, monkeypatch):
    for mesh in meshes:
        x = piece(randn(TOKENS, 8), mesh.context, mesh.tensor)
        weight = piece(randn(8, 8, seed=1), mesh.tensor, mesh.context).requires_grad_()
        y = summa(x, weight, Grid(mesh.context, mesh.tensor), 8)
        y.sum().backward()
        assert x.grad is None and weight.grad is not None
