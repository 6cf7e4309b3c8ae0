"""A stage carries out any schedule: loss and gradients equal those of the model in one piece."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpmp
from mpmp.parallel.data import GradientBuckets
from mpmp.parallel.maker import Maker
from mpmp.parallel.pipeline import Microbatch, Pipeline
from mpmp.programs.schedules import SCHEDULES
from mpmp.programs.steps import Action

WIDTH, TIME, VOCABULARY = 4, 3, 6


class MLPStage(nn.Module):
    """One matrix a stage, an embedding before the first and a score behind the last."""

    width, dtype = WIDTH, torch.float64

    def __init__(self, mesh, stage):
        super().__init__()
        make = Maker(mesh, seed=5, dtype=self.dtype)
        self.first, self.last = mesh.is_first_stage, mesh.is_last_stage
        self.weight = make.parameter(f"w{stage}", (WIDTH, WIDTH), std=0.7)
        if self.first:
            self.table = make.parameter("table", (VOCABULARY, WIDTH), std=1.0)
        if self.last:
            self.output = make.parameter("output", (VOCABULARY, WIDTH), std=1.0)

    def forward(self, x, samples=None):
        if self.first:
            x = F.embedding(x, self.table)
        return x + (x @ self.weight).tanh()

    def token_losses(self, x, targets):
        logits = x @ self.output.T
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


class Whole(nn.Module):
    """All stages of one model in one process, for comparison."""

    width, dtype = WIDTH, torch.float64

    def __init__(self, world, stages):
        super().__init__()
        single = mpmp.comm.mesh.Mesh.single(world)
        self.stages = nn.ModuleList(MLPStage(single, n) for n in range(stages))
        for n, stage in enumerate(self.stages):
            stage.first, stage.last = n == 0, n == stages - 1

    def loss(self, inputs, targets, num_tokens):
        for stage in self.stages:
            inputs = stage(inputs)
        return self.stages[-1].token_losses(inputs, targets).sum() / num_tokens


def backwards(stage, stages, microbatches):
    """A schedule of a user's own: the last microbatch first, both ways."""
    for number in reversed(range(microbatches)):
        yield Action("F", number)
    for number in range(microbatches):
        yield Action("B", number)


@pytest.mark.parametrize("rows", ((2, 2, 2, 2), (3, 1, 2), (1,), (2, 1, 1, 1, 1, 1, 1)), ids=len)
@pytest.mark.parametrize("schedule", [*SCHEDULES, "backwards"])
def test_any_schedule_gives_the_gradients_of_one_process(world, schedule, rows, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "backwards", backwards)
    mesh = mpmp.mesh(pipeline=world.size)
    stage = MLPStage(mesh, mesh.pipeline.rank)
    buckets = GradientBuckets(stage.parameters(), mesh, 1e6)
    pipeline = Pipeline(mesh, stage, schedule, nullcontext)
    whole = Whole(world, mesh.pipeline.size)
    generator = torch.Generator().manual_seed(9)
    for _ in range(2):
        tokens = torch.randint(VOCABULARY, (2, sum(rows), TIME), generator=generator)
        micro = [
            Microbatch(*pair, torch.arange(len(pair[0])))
            for pair in zip(*(one.split(rows) for one in tokens), strict=True)
        ]
        num_tokens = tokens[0].numel()
        loss = pipeline.train(micro, num_tokens, buckets)
        whole.zero_grad()
        expected = whole.loss(*tokens, num_tokens)
        expected.backward()
        if mesh.is_last_stage:
            assert torch.allclose(loss, expected, rtol=1e-13)
            assert torch.allclose(stage.output.grad, whole.stages[-1].output.grad, rtol=1e-12)
        own = whole.stages[mesh.pipeline.rank]
        assert torch.allclose(stage.weight.grad, own.weight.grad, rtol=1e-12)
        if mesh.is_first_stage:
            assert torch.allclose(stage.table.grad, own.table.grad, rtol=1e-12)
        score = pipeline.score(*tokens)
        if mesh.is_last_stage:
            assert torch.allclose(score / num_tokens, expected, rtol=1e-13)
    mesh.free()


@pytest.mark.ranks(4)
def test_no_more_microbatches_are_alive_than_the_schedule_says(world, monkeypatch):
    """1F1B keeps p - s of stage s's microbatches alive, GPipe all of them."""
    from mpmp.parallel import pipeline as module

    alive = []
    forward = module._Step.forward

    def counted(self, number):
        forward(self, number)
        alive.append(len(self._live))

    monkeypatch.setattr(module._Step, "forward", counted)
    mesh = mpmp.mesh(pipeline=4)
    stage = MLPStage(mesh, mesh.pipeline.rank)
    buckets = GradientBuckets(stage.parameters(), mesh, 1e6)
    micro = [Microbatch(*(torch.zeros(1, TIME, dtype=torch.int64),) * 2, torch.zeros(1))] * 8
    for schedule, peak in (("1f1b", 4 - mesh.pipeline.rank), ("gpipe", 8)):
        alive.clear()
        Pipeline(mesh, stage, schedule, nullcontext).train(micro, 24, buckets)
        assert max(alive) == peak, schedule
    mesh.free()
