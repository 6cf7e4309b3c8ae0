"""float16: all ranks, of a pipeline too, skip a step together and agree on the loss scale."""

from __future__ import annotations

import argparse

import pytest
import torch

import mpmp
from mpmp.config import Config, Data, Model, Parallel, Train
from mpmp.data.loader import load
from mpmp.errors import NotFiniteError
from mpmp.job import state
from mpmp.job.setup import make_objective
from mpmp.job.training import Training

pytestmark = pytest.mark.ranks(1, 2, 4)
AXES = ("data", "pipeline", "tensor")


def made(axis, size, dtype="float16"):
    config = Config(
        model=Model(layers=4, heads=4, width=16, context=8, seed=3),
        data=Data(path=argparse.__file__),
        train=Train(batch=8, dtype=dtype),
        parallel=Parallel(**{axis: size}),
    )
    mesh = mpmp.mesh(**{axis: size})
    return Training(config, mesh, make_objective(config, load(config.data)))


@pytest.mark.parametrize("axis", AXES)
def test_an_overflow_changes_nothing_but_the_scale(world, axis):
    training = made(axis, world.size)
    training.step(0, 0.0)
    before = [one.tensor.clone() for one in state.held(training)]
    updates = state.meta(training)["optimizer"]
    moderate = training.scale.value
    training.scale.value = 2.0**120  # gradients become infinite, in float32 too
    step = training.step(1, 0.0)
    assert step.skipped and step.loss < 10
    assert training.scale.value == 2.0**119
    assert updates == state.meta(training)["optimizer"] == {"updates": 1}
    for one, tensor in zip(state.held(training), before, strict=True):
        assert torch.equal(one.tensor, tensor), one.key
    training.scale.value = moderate
    assert not training.step(2, 0.0).skipped
    values = training.mesh.everyone.allgather(torch.tensor([training.scale.value]))
    assert len(set(values.tolist())) == 1
    training.mesh.free()


@pytest.mark.ranks(2)
def test_an_overflow_that_no_scale_cures_ends_the_training(world, monkeypatch):
    training = made("data", world.size)
    training.scale.value = 1.0
    monkeypatch.setattr("mpmp.job.training.global_norm", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(NotFiniteError, match="gradient norm inf"):
        training.step(0, 0.0)
    training.mesh.free()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("axis", AXES)
def test_scaled_gradients_are_those_of_float32(world, axis):
    """The scale itself leaves no trace: the same steps as without it, to what 16 bits can say."""
    half, whole = made(axis, world.size), made(axis, world.size, "float32")
    for number in range(3):
        ours, theirs = half.step(number, 0.0), whole.step(number, 0.0)
        assert ours.loss == pytest.approx(theirs.loss, rel=5e-3)
        assert ours.norm == pytest.approx(theirs.norm, rel=2e-2)
    half.mesh.free()
    whole.mesh.free()
