"""Every movement is a linear operator and its backward is the adjoint: <Fx, y> = <x, F*y>."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import mpmp
from mpmp.comm.mesh import Mesh
from mpmp.config import Comm
from mpmp.parallel import adjoints, beside, products
from mpmp.parallel.deferred import Deferred
from mpmp.parallel.products import Use, Way
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


@pytest.fixture(params=("at once", "beside"))
def each_group(group, world, request, monkeypatch):
    """One whose products wait for what moves, and one beside whose products pieces of it move."""
    if request.param == "at once":
        yield group
        return
    monkeypatch.setattr(beside, "LEAST_BYTES", 1)
    settings = Comm(windows="off", overlap="on")
    mesh = Mesh.over(world, tensor=world.size, settings=settings)
    yield mesh.tensor
    mesh.free()


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

PRODUCTS = {
    # way -> kinds of the input and the output of a column's and of a row's product
    False: {"column": ("replicated", "partial"), "row": ("partial", "replicated")},
    True: {"column": ("sharded", "partial"), "row": ("partial", "sharded")},
}


def product_of(name, group, sequence, dtype=torch.float64):
    """A function of (B, T, D), cut over T or not, by fixed weights of this rank alone."""
    generator = torch.Generator().manual_seed(100 + group.rank)
    first, second = (
        nn.Parameter(torch.randn(5, LENGTH, dtype=torch.float64, generator=generator).to(dtype))
        for _ in range(2)
    )
    way = Way(group, Deferred(), sequence)
    if name == "row":
        return lambda x: products.row(x, Use(first), way), [first]
    uses = [Use(first), Use(second, rows=(1, 4))]
    return lambda x: torch.cat(products.column(x, uses, way, LENGTH), dim=-1), [first, second]


def value(kind, group, shape, seed):
    """A random (B, T, D): equal on all ranks only where it is replicated, cut over T if sharded."""
    rank = 0 if kind == "replicated" else group.rank
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    start, stop = partition(LENGTH, group.size)[group.rank]
    time = stop - start if kind == "sharded" else LENGTH
    return torch.randn(2, time, shape, dtype=torch.float64, generator=generator)


def product_error(name, group, sequence):
    kind_in, kind_out = PRODUCTS[sequence][name]
    function, _ = product_of(name, group, sequence)
    x = value(kind_in, group, LENGTH, 1).requires_grad_()
    moved = function(x)
    y = value(kind_out, group, moved.shape[-1], 2)
    (back,) = torch.autograd.grad(moved, x, y)
    left = inner(kind_out, moved.detach(), y, group)
    right = inner(kind_in, x.detach(), back, group)
    return abs(left - right) / max(abs(left), abs(right))


@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
@pytest.mark.parametrize("name", ("column", "row"))
def test_a_product_with_its_movement_has_the_adjoint_as_backward(each_group, name, sequence):
    assert product_error(name, each_group, sequence) <= LIMIT


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
@pytest.mark.parametrize("name", ("column", "row"))
def test_a_wrong_backward_of_a_product_is_found(group, name, sequence, monkeypatch):
    function = getattr(products, f"_{name.title()}")
    right = function.backward

    def wrong(ctx, *grads):
        gradient, *rest = right(ctx, *grads)
        return (gradient / group.size, *rest)

    monkeypatch.setattr(function, "backward", staticmethod(wrong))
    assert product_error(name, group, sequence) > 1e-3


def both(group, dtype, sequence, fused):
    """Forward and gradients of a column's and a row's product, in one or by their halves."""
    own = slice(*partition(LENGTH, group.size)[group.rank])
    generator = torch.Generator().manual_seed(7)
    x, weight, bias, last, out = (
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        for shape in ((2, LENGTH, LENGTH), (LENGTH, LENGTH), (LENGTH,), (LENGTH,), (2, LENGTH, 7))
    )
    x, out = (one[:, own].contiguous() if sequence else one for one in (x, out))
    x.requires_grad_()
    column, row = (nn.Parameter(one.clone()) for one in (weight[own], weight[:, own]))
    bias, last = nn.Parameter(bias[own].clone()), nn.Parameter(last)
    if fused:
        way = Way(group, Deferred(), sequence)
        (hidden,) = products.column(x, [Use(column, bias)], way, LENGTH)
        y = products.row(hidden, Use(row, last), way)
    elif sequence:
        hidden = linear(adjoints.allgather(x, group, LENGTH, 1), column, bias)
        y = adjoints.reduce_scatter(linear(hidden, row), group, 1) + last
    else:
        hidden = linear(adjoints.replicate(x, group), column, bias)
        y = adjoints.allreduce(linear(hidden, row), group) + last
    y.backward(out.to(y.dtype))
    if sequence and not fused:  # of the piece only, where the product sees all of it
        last.grad = group.allreduce(last.grad)
    return [y.detach(), *(one.grad for one in (x, column, bias, row, last))]


@pytest.mark.parametrize("sequence", (False, True), ids=("whole", "pieces"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_products_in_one_with_their_movement_equal_the_two_apart(group, dtype, sequence):
    limit = 1e-12 if dtype is torch.float64 else 1e-5
    fused, apart = (both(group, dtype, sequence, how) for how in (True, False))
    for one, other in zip(fused, apart, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).abs().max() <= limit * other.abs().max()


def test_products_follow_autocast(group):
    """Which takes float32 for bfloat16, and leaves float64 as it is."""
    for dtype, expected in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fused, apart = (both(group, dtype, False, how) for how in (True, False))
        assert fused[0].dtype == expected
        for one, other in zip(fused, apart, strict=True):
            assert (one - other).abs().max() <= 0.05 * other.abs().max()
        assert all(one.dtype == dtype for one in fused[1:])


def test_what_is_frozen_costs_no_gradient(group, monkeypatch):
    """Nor a sum over the group, where what was replicated needs none."""
    x, weight = torch.ones(1, 2, 3), nn.Parameter(torch.ones(4, 3))
    (y,) = products.column(x, [Use(weight)], Way(group, Deferred()), 2)
    monkeypatch.setattr(Way, "summed", None)
    y.sum().backward()
    assert x.grad is None and bool((weight.grad == 2).all())
