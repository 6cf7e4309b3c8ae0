"""Gradient buckets: summed once, in one order, whatever is used and whenever it is ready."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mpmp
from mpmp.parallel import zero
from mpmp.parallel.maker import Maker

F64 = torch.float64


class Layers(nn.Module):
    """Five weights of which each rank may leave some unused."""

    def __init__(self, make, first=0):
        super().__init__()
        self.weights = nn.ParameterList(
            make.parameter(f"w{first + n}", (n + 1, 3), std=1.0) for n in range(5)
        )

    def loss(self, x, used):
        return sum((self.weights[n] * x).square().sum() for n in used)


@pytest.fixture(scope="module")
def mesh(world):
    return mpmp.mesh(data=world.size)


def setup(mesh, bucket_bytes):
    model = Layers(Maker(mesh, seed=1, dtype=F64))
    return model, zero.make([model], mesh, 0, bucket_bytes)


def started(monkeypatch, buckets):
    """Numbers of the buckets, filled as they start."""
    found = []
    for number, bucket in enumerate(buckets.buckets):
        start = bucket.start
        monkeypatch.setattr(
            bucket, "start", lambda n=number, start=start: (found.append(n), start())
        )
    return found


def expected(model, uses):
    """Gradient sums computed in one process; ``uses`` lists (x, used) of every backward."""
    weights = [one.detach().clone().requires_grad_() for one in model.weights]
    loss = sum((weights[n] * x).square().sum() for x, used in uses for n in used)
    if uses:
        loss.backward()
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]


def assert_sums(model, uses):
    for weight, gradient in zip(model.weights, expected(model, uses), strict=True):
        assert torch.allclose(weight.grad, gradient, rtol=1e-13)


@pytest.mark.parametrize("bucket_bytes", (1, 100, 1e9), ids=("one-each", "some", "all-in-one"))
def test_sums_over_replicas_and_microbatches(mesh, bucket_bytes):
    model, buckets = setup(mesh, bucket_bytes)
    assert len(buckets.buckets) == {1: 5, 100: 4, 1e9: 1}[bucket_bytes]
    for step in range(3):
        buckets.begin()
        for micro in range(2):
            with buckets.writing(0, last=micro == 1):
                model.loss(mesh.data.rank + micro + step + 1.0, range(5)).backward()
        buckets.finish()
        ranks = range(mesh.data.size)
        assert_sums(model, [(r + m + step + 1.0, range(5)) for r in ranks for m in range(2)])


def test_parameters_unused_on_some_ranks_or_on_all(mesh):
    """Rank r leaves out weight r; weight 4 is used by nobody: sums still meet their partners."""
    model, buckets = setup(mesh, 1)
    uses = [(r + 1.0, [n for n in range(4) if n != r]) for r in range(mesh.data.size)]
    for _ in range(2):
        buckets.begin()
        with buckets.writing(0, last=True):
            model.loss(*uses[mesh.data.rank]).backward()
        buckets.finish()
        assert_sums(model, uses)


def test_buckets_start_in_order_and_during_backward(mesh, monkeypatch):
    model, buckets = setup(mesh, 1)
    found = started(monkeypatch, buckets)
    buckets.begin()
    with buckets.writing(0):
        model.loss(1.0, range(5)).backward()
    assert found == [], "not before the last microbatch"
    with buckets.writing(0, last=True):
        # Weight 2 (bucket 2) has no gradient, so buckets 3 and 4 wait for their turn.
        model.loss(1.0, [0, 1, 3, 4]).backward()
        assert found == [0, 1]
    assert found == [0, 1, 2, 3, 4], "nothing more comes when the action is over"
    buckets.finish()
    assert found == [0, 1, 2, 3, 4]


def test_each_rank_may_compute_them_in_its_own_order(mesh):
    model, buckets = setup(mesh, 1)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(mesh.data.rank)).tolist()
    buckets.begin()
    with buckets.writing(0, last=True):
        for n in order:
            model.loss(mesh.data.rank + 1.0, [n]).backward()
    buckets.finish()
    assert_sums(model, [(rank + 1.0, range(5)) for rank in range(mesh.data.size)])


def test_chunks_and_gradients_that_were_left_for_later(mesh, monkeypatch):
    """Two chunks whose backwards leave the even weights; another action computes those."""
    make = Maker(mesh, seed=1, dtype=F64)
    chunks = [Layers(make), Layers(make, first=5)]
    buckets = zero.make(chunks, mesh, 0, 1)
    found = started(monkeypatch, buckets)
    x = mesh.data.rank + 1.0

    def later(chunk, last):
        kept = [chunks[chunk].weights[n] for n in (4, 2, 0)]
        with buckets.writing(chunk, last=last, deferred=kept):
            for weight in kept:
                buckets.add(weight, 2 * x * x * weight.detach())
                assert last or not found

    buckets.begin()
    for micro in range(2):
        for chunk in (1, 0):
            with buckets.writing(chunk, complete=False):
                chunks[chunk].loss(x, [1, 3]).backward()
        if micro == 0:
            later(1, False)
    later(0, False)
    later(1, True)
    assert found == [0, 1, 2, 3, 4], "chunk 1 lies in front"
    later(0, True)
    assert found == list(range(10))
    buckets.finish()
    for chunk in chunks:
        assert_sums(chunk, [(r + 1.0, range(5)) for r in range(mesh.data.size) for _ in range(2)])


def test_a_weight_of_two_chunks_is_summed_when_both_are_done(mesh, monkeypatch):
    make = Maker(mesh, seed=1, dtype=F64)
    chunks = [Layers(make), Layers(make, first=5)]
    chunks[1].weights[0] = chunks[0].weights[0]
    buckets = zero.make(chunks, mesh, 0, 1e9)
    found = started(monkeypatch, buckets)
    assert len(buckets.buckets) == 3
    buckets.begin()
    for chunk in (0, 1):
        with buckets.writing(chunk, last=True):
            chunks[chunk].loss(1.0, range(5)).backward()
        assert len(found) == 1 + 2 * chunk
    buckets.finish()
    shared = chunks[0].weights[0]
    assert torch.allclose(shared.grad, 4.0 * mesh.data.size * shared.detach(), rtol=1e-13)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_weight_of_both_ends_is_summed_over_stages_too(world, stage):
    mesh = mpmp.mesh(pipeline=2)
    make = Maker(mesh, seed=1, dtype=F64)
    ends = nn.Module()
    ends.shared = make.parameter("tied", (3,), std=1.0, stages=(0, 1))
    ends.own = make.parameter(f"own{mesh.pipeline.rank}", (2,), std=1.0)
    buckets = zero.make([ends], mesh, stage, 1e9)
    for _ in range(2):
        buckets.begin()
        with buckets.writing(0, last=True):
            ((ends.shared.sum() + ends.own.sum()) * (world.rank + 1)).backward()
        buckets.finish()
        found = buckets.gradients()
        assert bool((found["tied"][1] == sum(range(1, world.size + 1))).all())
        own = found[f"own{mesh.pipeline.rank}"][1]
        assert bool((own == sum(rank + 1 for rank in mesh.data.ranks)).all())
    mesh.free()


@pytest.mark.ranks(2)
def test_buckets_between_hosts_are_a_twentieth_of_the_gradients(mesh, monkeypatch):
    from mpmp.parallel.flat import usual_bytes

    assert usual_bytes(mesh.data, int(1e9)) == 4e6
    monkeypatch.setattr(mesh.data, "hosts", (0, 1))
    assert [usual_bytes(mesh.data, total) for total in (1, int(2e7), int(1e9))] == [5e5, 1e6, 4e6]
    model = nn.Module()
    make = Maker(mesh, seed=1, dtype=F64)
    model.weights = nn.ParameterList(make.parameter(f"w{n}", (250, 100)) for n in range(10))
    sharded = zero.make([model], mesh, 0, None)
    assert [one.flat.length for one in sharded.buckets] == [50_000] * 5
