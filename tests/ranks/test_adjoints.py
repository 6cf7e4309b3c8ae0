"""Every movement is a linear operator and its backward is the adjoint: <Fx, y> = <x, F*y>."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

import mpmp
from mpmp.parallel import adjoints
from mpmp.programs.partition import partition

LIMIT = 1e-12
LENGTH = 7  # no multiple of 2, 3 or 4

# movement -> kind of what goes in, kind of what comes out, and how it is called
MOVEMENTS = {
    "replicate": ("replicated", "partial", lambda x, g, d: adjoints.replicate(x, g)),
    "allreduce": ("partial", "replicated", lambda x, g, d: adjoints.allreduce(x, g)),
    "split": ("replicated", "sharded", lambda x, g, d: adjoints.split(x, g, d)),
    "gather": ("sharded", "replicated", lambda x, g, d: adjoints.gather(x, g, LENGTH, d)),
    "reduce_scatter": ("partial", "sharded", lambda x, g, d: adjoints.reduce_scatter(x, g, d)),
    "allgather": ("sharded", "partial", lambda x, g, d: adjoints.allgather(x, g, LENGTH, d)),
}


@pytest.fixture(scope="module")
def group(world):
    return mpmp.mesh(tensor=world.size).tensor


def vector(kind, group, dim, seed):
    """A random vector of a kind: equal on all ranks only where it is replicated."""
    rank = 0 if kind == "replicated" else group.rank
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    shape = [LENGTH, LENGTH]
    if kind == "sharded":
        start, stop = partition(LENGTH, group.size)[group.rank]
        shape[dim] = stop - start
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def inner(kind, a, b, group):
    """The inner product of a kind: a replicated vector counts once, others on every rank."""
    product = (a * b).sum().view(1)
    return float(product if kind == "replicated" else group.allreduce(product))


def adjoint_error(name, group, dim):
    kind_in, kind_out, movement = MOVEMENTS[name]
    x = vector(kind_in, group, dim, 1).requires_grad_()
    y = vector(kind_out, group, dim, 2)
    moved = movement(x, group, dim)
    (back,) = torch.autograd.grad(moved, x, y)
    left = inner(kind_out, moved.detach(), y, group)
    right = inner(kind_in, x.detach(), back, group)
    return abs(left - right) / max(abs(left), abs(right))


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("name", MOVEMENTS)
def test_backward_is_the_adjoint(group, name, dim):
    assert adjoint_error(name, group, dim) <= LIMIT


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("name", MOVEMENTS)
def test_a_wrong_backward_is_found(group, name, monkeypatch):
    """With the backward of each movement scaled by 1/size, as if a mean were meant, or dropped."""
    function = getattr(adjoints, f"_{name.title().replace('_', '')}")
    right = function.backward

    def wrong(ctx, grad):
        gradient, *rest = right(ctx, grad)
        return (gradient / group.size, *rest)

    monkeypatch.setattr(function, "backward", staticmethod(wrong))
    assert adjoint_error(name, group, 0) > 1e-3


@pytest.mark.parametrize("dim", (0, 1))
def test_movements_put_things_where_they_belong(group, dim):
    whole = torch.arange(LENGTH * LENGTH, dtype=torch.float64).view(LENGTH, LENGTH)
    start, stop = partition(LENGTH, group.size)[group.rank]
    own = whole.narrow(dim, start, stop - start)
    assert torch.equal(adjoints.split(whole, group, dim), own)
    assert torch.equal(adjoints.gather(own, group, LENGTH, dim), whole)
    assert torch.equal(adjoints.allgather(own, group, LENGTH, dim), whole)
    assert torch.equal(adjoints.reduce_scatter(whole, group, dim), own * group.size)
    assert torch.equal(adjoints.allreduce(whole, group), whole * group.size)
    assert torch.equal(adjoints.replicate(whole, group), whole)


# --- movements in one with the product beside them ------------------------------------------------


def products(group, dtype, fused):
    """Forward and gradients of both products, by the fused functions or by their two halves."""
    own = slice(*partition(LENGTH, group.size)[group.rank])
    generator = torch.Generator().manual_seed(7)
    x, weight, bias, out = (
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        for shape in ((2, 3, LENGTH), (LENGTH, LENGTH), (LENGTH,), (2, 3, LENGTH))
    )
    x.requires_grad_()
    column, row = weight[own].clone().requires_grad_(), weight[:, own].clone().requires_grad_()
    bias = bias[own].clone().requires_grad_()
    if fused:
        hidden = adjoints.replicate_linear(x, column, bias, group)
        y = adjoints.linear_allreduce(hidden, row, group)
    else:
        hidden = linear(adjoints.replicate(x, group), column, bias)
        y = adjoints.allreduce(linear(hidden, row), group)
    y.backward(out.to(y.dtype))
    return [y.detach(), *(one.grad for one in (x, column, bias, row))]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_products_in_one_with_their_movement_equal_the_two_apart(group, dtype):
    limit = 1e-12 if dtype is torch.float64 else 1e-5
    for one, other in zip(products(group, dtype, True), products(group, dtype, False), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).abs().max() <= limit * other.abs().max()


def test_products_follow_autocast(group):
    """Which takes float32 for bfloat16, and leaves float64 as it is."""
    for dtype, expected in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fused, apart = products(group, dtype, True), products(group, dtype, False)
        assert fused[0].dtype == apart[0].dtype == expected
        for one, other in zip(fused, apart, strict=True):
            assert one.dtype == other.dtype
            assert (one - other).abs().max() <= 0.05 * other.abs().max()


def test_what_is_frozen_costs_no_gradient(group, monkeypatch):
    """Nor a sum over the group, where what was replicated needs none."""
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    y = adjoints.replicate_linear(x, weight, None, group)
    monkeypatch.setattr(adjoints, "_product_summed", None)
    y.sum().backward()
    assert x.grad is None and bool((weight.grad == 2).all())
