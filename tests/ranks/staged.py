"""A small model in stages, and the same in one piece: what a pipeline is tested with.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from mpmp.comm.mesh import Mesh
from mpmp.parallel.deferred import Deferred
from mpmp.parallel.maker import Maker
from mpmp.parallel.stage import NOT_COUNTED, Microbatch, Part

WIDTH, TIME, VOCABULARY = 4, 3, 6


class _Product(torch.autograd.Function):
    """``x @ weight`` whose weight gradient is deferred where that is asked for."""

    @staticmethod
    def forward(ctx, x, weight, deferred):
        ctx.save_for_backward(x)
        ctx.weight, ctx.deferred = weight, deferred
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        (x,), weight = ctx.saved_tensors, ctx.weight

        def weight_grad():
            return x.flatten(0, 1).T @ grad.flatten(0, 1)

        if not ctx.deferred.active:
            return grad @ weight.T, weight_grad(), None
        ctx.deferred.keep(weight, weight_grad)
        return grad @ weight.T, None, None


class MLPStage(nn.Module):
    """A matrix a stage, an embedding before the first and a score behind the last.

    ``table``: that of the first stage, where the last one uses it, too. Each stage adds the mean
    square of its bias times what came in to the objective of every sequence.
    """

    dtype = torch.float64

    def __init__(self, mesh, part, table=None):
        super().__init__()
        make = Maker(mesh, seed=5, dtype=self.dtype)
        self.part, self.deferred = part, Deferred()
        self.weight = make.parameter(f"w{part.number}", (WIDTH, WIDTH), std=0.7)
        self.bias = make.parameter(f"b{part.number}", (WIDTH,), std=0.3)
        if part.first:
            self.table = make.parameter("table", (VOCABULARY, WIDTH), std=1.0)
        if part.last:
            self.output = make.parameter("output", (VOCABULARY, WIDTH), std=1.0)
            if table is not None:
                self.output = table

    def forward(self, x, microbatch):
        if self.part.first:
            x = F.embedding(x, self.table)
        extra = (x * self.bias).square().mean((1, 2)).sum()
        return x + (_Product.apply(x, self.weight, self.deferred) + self.bias).tanh(), extra

    def losses(self, x, microbatch):
        return F.cross_entropy(
            self.logits(x, microbatch).transpose(1, 2),
            microbatch.targets_Bt,
            reduction="none",
            ignore_index=NOT_COUNTED,
        )

    def logits(self, x, microbatch):
        return x @ self.output.T

    def hidden_shape(self, microbatch):
        return (*microbatch.inputs_Bt.shape, WIDTH)


def chunks_of(mesh, schedule):
    """The stages of this rank; the ends share a table where they lie on one rank."""
    rank, size = mesh.pipeline.rank, mesh.pipeline.size
    numbers = [schedule.stage_of(rank, chunk, size) for chunk in range(schedule.chunks)]
    return build(mesh, numbers, schedule.chunks * size)


def build(mesh, numbers, stages, tied=None):
    made = []
    for number in numbers:
        part = Part(number, stages, (number, number + 1))
        ends = {0, stages - 1} <= set(numbers) if tied is None else tied
        table = made[0].table if part.last and made and ends else None
        made.append(MLPStage(mesh, part, table))
    return made


class Whole:
    """All stages of one model in one process, for comparison."""

    def __init__(self, world, stages, tied):
        self.stages = nn.ModuleList(build(Mesh.single(world), range(stages), stages, tied))

    def objective(self, microbatch, num_tokens, num_sequences):
        """(loss, loss with what the stages add) of one batch."""
        x, extras = microbatch.inputs_Bt, 0.0
        for stage in self.stages:
            x, extra = stage(x, microbatch)
            extras = extras + extra
        loss = self.stages[-1].losses(x, microbatch).sum() / num_tokens
        return loss, loss + extras / num_sequences

    def gradients(self):
        return {one.placement.name: one.grad for one in self.stages.parameters()}


class Written:
    """Gradients of one replica, kept in the modules; it minds the order in which they come."""

    exposed_s = 0.0

    def __init__(self, chunks):
        self.parameters = [list(chunk.parameters()) for chunk in chunks]
        self.closed = []

    def begin(self):
        self.closed = []
        for one in sum(self.parameters, []):
            one.grad = None

    @contextmanager
    def writing(self, chunk, *, last=False, complete=True, deferred=None):
        assert chunk not in self.closed, "written after its last action"
        assert complete or not last
        yield
        if last:
            self.closed.append(chunk)

    def add(self, parameter, gradient):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def finish(self):
        assert sorted(self.closed) == list(range(len(self.parameters)))


def microbatches_of(rows, generator, time=TIME):
    """Microbatches of so many sequences each, and all of them as one; some tokens do not count."""
    inputs, targets = torch.randint(VOCABULARY, (2, sum(rows), time), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = NOT_COUNTED
    targets[0, 0] = 1

    def made(inputs, targets):
        samples = torch.arange(len(inputs))
        return Microbatch(inputs, targets, samples, torch.arange(time), time)

    pieces = zip(inputs.split(rows), targets.split(rows), strict=True)
    return [made(*piece) for piece in pieces], made(inputs, targets)
