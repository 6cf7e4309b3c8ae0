"""The bubble of four ranks whose stages sleep for their time is that of the simulation."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mpmp
from mpmp.parallel.deferred import Deferred
from mpmp.parallel.pipeline import Pipeline
from mpmp.parallel.recorder import Recorder
from mpmp.programs.schedules import SCHEDULES
from mpmp.programs.timeline import Times, simulate_schedule
from ranks.staged import Written, microbatches_of

FORWARD_S = BACKWARD_S = WEIGHT_S = 0.04
WITHIN = 0.03
STEPS = 6


class _Sleep(torch.autograd.Function):
    """The identity, which takes its time in each of its three parts."""

    @staticmethod
    def forward(ctx, x, weight, deferred, share):
        ctx.weight, ctx.deferred, ctx.share = weight, deferred, share
        time.sleep(FORWARD_S * share)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(BACKWARD_S * ctx.share)

        def weight_grad():
            time.sleep(WEIGHT_S * ctx.share)
            return torch.zeros(1)

        if not ctx.deferred.active:
            return grad, weight_grad(), None, None
        ctx.deferred.keep(ctx.weight, weight_grad)
        return grad, None, None, None


class SleepingStage(nn.Module):
    """A stage that takes ``share`` of the time of a rank."""

    dtype = torch.float32

    def __init__(self, share):
        super().__init__()
        self.weight, self.deferred, self.share = nn.Parameter(torch.zeros(1)), Deferred(), share

    def forward(self, x, microbatch):
        return _Sleep.apply(x.float(), self.weight, self.deferred, self.share), None

    def losses(self, x, microbatch):
        return x

    def hidden_shape(self, microbatch):
        return tuple(microbatch.inputs_Bt.shape)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", ("1f1b", "gpipe", "interleaved", "zb_h1"))
def test_measured_bubble_is_the_simulated_one(world, name):
    schedule, m = SCHEDULES[name], 8
    mesh = mpmp.mesh(pipeline=4)
    share = 1 / schedule.chunks
    stages = [SleepingStage(share) for _ in range(schedule.chunks)]
    recorder = Recorder(mesh)
    pipeline = Pipeline(mesh, stages, schedule, nullcontext, recorder)
    pieces, _ = microbatches_of([1] * m, torch.Generator().manual_seed(1))
    times = Times(FORWARD_S, BACKWARD_S, WEIGHT_S).cut(schedule.chunks)
    simulated = simulate_schedule(schedule, 4, m, times).bubble
    measured: list[float] = []
    # The first step opens connections, and others on the machine can make any step wait.
    while len(measured) < STEPS and not (measured and abs(measured[-1] - simulated) <= WITHIN):
        pipeline.train(pieces, m, m, Written(stages))
        measured.append(recorder.timeline(schedule, m).bubble)
    print(f"{name}: simulated {simulated:.4f}, measured {measured}")
    assert abs(measured[-1] - simulated) <= WITHIN, (measured, simulated)
    mesh.free()
