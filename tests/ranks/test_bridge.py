"""Allreduce over hosts with windows: four ranks that take themselves for two hosts of two."""

from __future__ import annotations

import pytest
import torch

from mpmp.comm import mesh as mesh_module
from mpmp.comm.bridge import Bridge, Bridged
from mpmp.comm.mesh import Mesh
from mpmp.comm.window import Windows
from mpmp.config import Comm
from mpmp.errors import TensorError
from ranks.windowed import Alike, in_rank_order, values

pytestmark = pytest.mark.ranks(4)

HIERARCHICAL = "hierarchical"
TAKEN = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8)
OPS = ("sum", "avg", "max", "min", "prod")


def mesh_on(monkeypatch, world, hosts, settings=None):
    """All ranks, who believe that they are on these hosts."""
    monkeypatch.setattr(mesh_module, "_hosts", lambda world: list(hosts))
    return Mesh.over(world, settings=settings)


@pytest.fixture(params=((0, 0, 2, 2), (0, 1, 0, 1)), ids=("in order", "dealt"))
def group(request, world, monkeypatch):
    mesh = mesh_on(monkeypatch, world, request.param)
    yield mesh.everyone
    mesh.free()


@pytest.fixture
def crossed(monkeypatch):
    """Calls that crossed the bridge."""
    calls = []
    carry_out = Bridge.carry_out

    def counted(self, *call):
        calls.append(call)
        carry_out(self, *call)

    monkeypatch.setattr(Bridge, "carry_out", counted)
    return calls


def small(length, rank, dtype, op):
    """Few and whole, so that every order gives the same bits."""
    x = (torch.arange(length) * 7 + 3 * rank) % 11
    return (1 + x % 2 if op == "prod" else x).to(dtype)


def all_of(group, length, dtype, op):
    every = [small(length, rank, dtype, op) for rank in range(group.size)]
    return in_rank_order(every, op)


@pytest.mark.parametrize("op", OPS)
def test_every_operation_on_every_dtype_that_crosses(group, crossed, world, op):
    alike = Alike()
    for dtype in TAKEN:
        if op == "avg" and not dtype.is_floating_point:
            continue
        for length in (0, 1, 2, 3, 7, 1000, 200_003):
            x = small(length, group.rank, dtype, op)
            before, right = x.clone(), all_of(group, length, dtype, op)
            result = group.allreduce(x, op=op, algorithm=HIERARCHICAL)
            assert torch.equal(result, right) and torch.equal(x, before), (dtype, length)
            group.allreduce(x, op=op, algorithm=HIERARCHICAL, out=x)
            assert torch.equal(x, right), (dtype, length)
            alike(x)
    assert len(crossed) == 2 * 7 * (2 if op == "avg" else len(TAKEN))
    assert alike.agree(world)


def test_sums_have_the_same_bits_on_all_ranks(group, world):
    alike = Alike()
    for length in (5, 100_001):
        alike(group.allreduce(values(length, group.rank, torch.float32), algorithm=HIERARCHICAL))
    assert alike.agree(world)


@pytest.mark.parametrize("placement", ("share", "ordinary"))
@pytest.mark.parametrize("op", ("sum", "avg", "max"))
def test_prepared(group, placement, op):
    group.allreduce(torch.ones(1), algorithm=HIERARCHICAL)
    inside = group.bridge.groups[0]
    for length in (0, 3, 300_001):
        shared = placement == "share"
        x = inside.empty((length,), torch.float32) if shared else torch.empty(length)
        handle = group.prepare_allreduce(x, op=op, algorithm=HIERARCHICAL)
        assert isinstance(handle, Bridged)
        right = all_of(group, length, torch.float32, op)
        for call in (handle.run, lambda: handle.start().wait(), handle.run):  # noqa: B023
            x.copy_(small(length, group.rank, torch.float32, op))
            call()
            assert torch.equal(x, right), length
        handle.free()
        with pytest.raises(TensorError, match="was freed"):
            handle.run()


def test_what_keeps_the_program(group, crossed):
    for dtype in (torch.bfloat16, torch.float16):
        x = small(999, group.rank, dtype, "sum")
        right = all_of(group, 999, dtype, "sum")
        assert torch.equal(group.allreduce(x, algorithm=HIERARCHICAL), right)
    x = small(999, group.rank, torch.float32, "sum")
    total = group.allreduce(x, op=lambda a, b: a + b, algorithm=HIERARCHICAL)
    assert torch.equal(total, all_of(group, 999, torch.float32, "sum"))
    assert not crossed


def test_differences_are_refused_on_all_ranks(group):
    """By all ranks of all hosts at the first, and again once the bridge is open."""
    for _ in range(2):
        for differ in (group.rank == 3, group.rank in (0, 1)):
            with pytest.raises(TensorError, match="disagree"):
                group.allreduce(torch.zeros(1001 + differ), algorithm=HIERARCHICAL)
        assert group.allreduce(torch.ones(3), algorithm=HIERARCHICAL).tolist() == [4.0] * 3


@pytest.mark.parametrize("hosts", ((0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 0, 3)))
def test_hosts_between_which_there_is_no_bridge(world, monkeypatch, hosts):
    mesh = mesh_on(monkeypatch, world, hosts)
    assert mesh.everyone.bridge is None
    x = torch.full((100,), float(world.rank))
    assert bool((mesh.everyone.allreduce(x, algorithm=HIERARCHICAL) == 6).all())
    mesh.free()


def test_without_shared_memory_on_every_host_messages_are_sent(world, monkeypatch, crossed):
    ready = Windows.ready
    monkeypatch.setattr(Windows, "ready", lambda self: world.rank > 1 and ready(self))
    planted = mesh_on(monkeypatch, world, (0, 0, 2, 2))
    off = mesh_on(monkeypatch, world, (0, 0, 2, 2), Comm(windows="off"))
    for mesh in (planted, off):
        x = torch.full((100,), float(world.rank))
        for _ in range(2):
            assert bool((mesh.everyone.allreduce(x, algorithm=HIERARCHICAL) == 6).all())
        mesh.free()
    assert not crossed
