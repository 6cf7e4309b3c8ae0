"""Every movement is a linear operator and its backward is the adjoint: <Fx, y> = <x, F*y>."""

from __future__ import annotations

import pytest
import torch

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
