"""Gradient buckets: summed once, in one order, whatever is used and whenever it is ready."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mpmp
from mpmp.parallel.data import GradientBuckets
from mpmp.parallel.maker import Maker


class Layers(nn.Module):
    """Five weights of which each rank may leave some unused."""

    def __init__(self, make):
        super().__init__()
        self.weights = nn.ParameterList(
            make.parameter(f"w{n}", (n + 1, 3), std=1.0) for n in range(5)
        )

    def loss(self, x, used):
        return sum((self.weights[n] * x).square().sum() for n in used)


@pytest.fixture(scope="module")
def mesh(world):
    return mpmp.mesh(data=world.size)


def setup(mesh, bucket_bytes):
    model = Layers(Maker(mesh, seed=1, dtype=torch.float64))
    return model, GradientBuckets(model.parameters(), mesh, bucket_bytes)


def expected(model, uses):
    """Gradient sums computed in one process; ``uses`` lists (x, used) of every backward."""
    weights = [one.detach().clone().requires_grad_() for one in model.weights]
    loss = sum((weights[n] * x).square().sum() for x, used in uses for n in used)
    if uses:
        loss.backward()
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]


@pytest.mark.parametrize("bucket_bytes", (1, 100, 1e9), ids=("one-each", "some", "all-in-one"))
def test_sums_over_replicas_and_microbatches(mesh, bucket_bytes):
    model, buckets = setup(mesh, bucket_bytes)
    assert len(buckets.buckets) == {1: 5, 100: 4, 1e9: 1}[bucket_bytes]
    for step in range(3):
        buckets.expect()
        for micro in range(2):
            if micro == 1:
                buckets.last_microbatch()
            model.loss(mesh.data.rank + micro + step + 1.0, range(5)).backward()
        buckets.finish()
        uses = [
            (rank + micro + step + 1.0, range(5))
            for rank in range(mesh.data.size)
            for micro in range(2)
        ]
        for weight, gradient in zip(model.weights, expected(model, uses), strict=True):
            assert torch.allclose(weight.grad, gradient, rtol=1e-13)


def test_parameters_unused_on_some_ranks_or_on_all(mesh):
    """Rank r leaves out weight r; weight 4 is used by nobody: sums still meet their partners."""
    model, buckets = setup(mesh, 1)
    uses = [(r + 1.0, [n for n in range(4) if n != r]) for r in range(mesh.data.size)]
    for _ in range(2):
        buckets.expect()
        buckets.last_microbatch()
        model.loss(*uses[mesh.data.rank]).backward()
        buckets.finish()
        for weight, gradient in zip(model.weights, expected(model, uses), strict=True):
            assert torch.allclose(weight.grad, gradient, rtol=1e-13)


def test_buckets_start_in_order_and_during_backward(mesh, monkeypatch):
    model, buckets = setup(mesh, 1)
    started = []
    for number, bucket in enumerate(buckets.buckets):
        monkeypatch.setattr(bucket, "start", lambda n=number: started.append(n))
    buckets.expect()
    model.loss(1.0, range(5)).backward()
    assert started == [], "not before the last microbatch"
    buckets.last_microbatch()
    # Weight 2 (bucket 2) has no gradient, so buckets 3 and 4 wait for their turn.
    model.loss(1.0, [0, 1, 3, 4]).backward()
    assert started == [0, 1]
    buckets.finish()
    assert started == [0, 1, 2, 3, 4]


@pytest.mark.ranks(2, 4)
def test_a_weight_of_both_ends_is_summed_over_stages_too(world):
    mesh = mpmp.mesh(pipeline=2)
    make = Maker(mesh, seed=1, dtype=torch.float64)
    shared = make.parameter("tied", (3,), std=1.0, stages=(0, 1))
    own = make.parameter(f"own{mesh.pipeline.rank}", (2,), std=1.0)
    buckets = GradientBuckets([shared, own], mesh, 1e9)
    buckets.expect()
    buckets.last_microbatch()
    ((shared.sum() + own.sum()) * (world.rank + 1)).backward()
    buckets.finish()
    assert bool((shared.grad == sum(range(1, world.size + 1))).all())
    assert bool((own.grad == sum(rank + 1 for rank in mesh.data.ranks)).all())
    mesh.free()
