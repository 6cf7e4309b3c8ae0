"""The stages of one rank, carrying out any schedule.

    rank 0   F0 F1 F2       B0 F3 B1    B2    B3       F  takes hidden states from the stage
    rank 1      F0 F1    B0 F2 B1 F3 B2    B3             before, gives its own to the next
    rank 2         F0 B0 F1 B1 F2 B2 F3 B3             B  takes the gradient from the stage
                                                          behind, gives its own to the one before
    where the backward is split:                       W  computes what B left: the gradients of
                                                          weights, which nobody waits for

Each stage owns its own graph: hidden states enter as leaves, and gradients are handed over as
tensors. A receive is posted one action ahead, so that it is under way while the rank computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mpmp.comm.mesh import Mesh
from mpmp.parallel.borders import Borders
from mpmp.parallel.data import Gradients
from mpmp.parallel.deferred import Kept
from mpmp.parallel.recorder import Recorder
from mpmp.parallel.stage import Microbatch, Stage
from mpmp.programs.check_schedules import check_schedule
from mpmp.programs.steps import BACKWARD, FORWARD, WEIGHT, Action, Actions, Fused, Schedule


class Pipeline:
    """Runs microbatches through the stages of one replica; ``stages`` are this rank's chunks.

    ``context`` gives the arithmetic of a forward (an autocast, or nothing). A ``recorder`` notes
    when each action of a step was done. ``first_rank`` and ``last_rank`` are the places on the
    pipeline axis that hold the first and the last stage.
    """

    def __init__(
        self,
        mesh: Mesh,
        stages: Sequence[Stage],
        schedule: Schedule,
        context: Callable[[], AbstractContextManager[object]],
        recorder: Recorder | None = None,
    ) -> None:
        assert len(stages) == schedule.chunks, "one stage a chunk"
        self.group, self.schedule, self.stages = mesh.pipeline, schedule, tuple(stages)
        self.context, self.device, self.recorder = context, mesh.world.device, recorder
        size = self.group.size
        self.first_rank, _ = schedule.place_of(0, size)
        self.last_rank, self._last_chunk = schedule.place_of(schedule.chunks * size - 1, size)
        self._plans: dict[int, tuple[Actions, int]] = {}

    @property
    def last(self) -> Stage | None:
        """The last stage, on the rank that has it."""
        return self.stages[self._last_chunk] if self.group.rank == self.last_rank else None

    def is_last(self, chunk: int) -> bool:
        """Whether a chunk of this rank is the last stage."""
        return chunk == self._last_chunk and self.group.rank == self.last_rank

    def train(
        self,
        microbatches: Sequence[Microbatch],
        num_tokens: int,
        num_sequences: int,
        gradients: Gradients,
        scale: float = 1.0,
    ) -> Tensor:
        """Forward and backward of all microbatches; gradients are complete afterwards.

        The objective is the sum of token losses over ``num_tokens``, the counted tokens of the
        whole global batch, and what stages add to it over ``num_sequences``, its sequences; so
        sums over replicas need no further scale. Gradients are ``scale`` times those of it.
        Returns this rank's part of the loss, without what stages add, as a float64 scalar; zero
        where the last stage is not.
        """
        actions, ahead = self._plan(len(microbatches))
        step = _Step(self, microbatches, num_tokens, num_sequences, scale, gradients)
        last = _last_writes(actions, self.schedule.splits)
        gradients.begin()
        if self.recorder is not None:
            self.recorder.begin()
        for number, action in enumerate(actions):
            for coming in actions[number : number + 1 + ahead]:
                step.expect(coming)
            needs = [step.take(part) for part in action.parts]
            if self.recorder is not None:
                self.recorder.start()
            for part, x in zip(action.parts, needs, strict=True):
                step.carry_out(part, x, part in last)
            if self.recorder is not None:
                self.recorder.end()
        step.finish()
        gradients.finish()
        return step.loss

    @torch.no_grad()
    def score(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Sum of all token losses as a float64 scalar; zero where the last stage is not."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for microbatch, hidden in zip(microbatches, self._pass(microbatches), strict=False):
            assert self.last is not None
            with self.context():
                total += self.last.losses(hidden, microbatch).double().sum()
        return total

    @torch.no_grad()
    def scored(self, microbatch: Microbatch) -> tuple[Tensor, Tensor] | None:
        """Losses (B, t) and logits (B, t, V), on the rank of the last stage; None on the others."""
        hidden = self.hidden(microbatch)
        if hidden is None:
            return None
        assert self.last is not None
        with self.context():
            return self.last.losses(hidden, microbatch), self.last.logits(hidden, microbatch)

    @torch.no_grad()
    def hidden(self, microbatch: Microbatch) -> Tensor | None:
        """What comes out of the last stage, on the rank that has it; None on the others."""
        found = self._pass([microbatch])
        return found[0] if found else None

    def _pass(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Hidden states behind the last stage, by forwards alone; none where that stage is not."""
        borders = Borders(self.group, self.schedule)
        found: list[Tensor] = []
        # A chunk after the other, so that ranks work at the same time.
        for chunk, stage in enumerate(self.stages):
            for number, microbatch in enumerate(microbatches):
                action = Action(FORWARD, number, chunk)
                borders.expect(action, stage.hidden_shape(microbatch), stage.dtype, self.device)
                x = borders.take(action)
                with self.context():
                    hidden, _ = stage(microbatch.inputs_Bt if x is None else x, microbatch)
                borders.give(action, hidden)
                if self.is_last(chunk):
                    found.append(hidden)
        borders.finish()
        return found

    def _plan(self, microbatches: int) -> tuple[Actions, int]:
        """This rank's actions, proved to end, and how many of them ahead a receive is posted."""
        if microbatches not in self._plans:
            rank, size = self.group.rank, self.group.size
            ahead = check_schedule(self.schedule, size, microbatches).ahead
            actions = self.schedule.actions(rank, size, microbatches)
            self._plans[microbatches] = actions, max(1, ahead)
        return self._plans[microbatches]


class _Live(NamedTuple):
    """What a microbatch leaves on a stage between its forward and its backward."""

    x: Tensor | None
    """The hidden states that came in; their gradient goes back."""
    roots: list[GradientEdge]
    """Where the backward begins. The tensors themselves need not be kept alive."""
    gradients: list[Tensor]
    """Of the roots, but of hidden states that went on: that of the first root is to come."""


class _Step:
    """What the stages of one rank hold while one step's microbatches pass."""

    def __init__(
        self,
        pipeline: Pipeline,
        microbatches: Sequence[Microbatch],
        num_tokens: int,
        num_sequences: int,
        scale: float,
        gradients: Gradients,
    ) -> None:
        self._pipeline, self._microbatches = pipeline, microbatches
        self._num_tokens, self._num_sequences = num_tokens, num_sequences
        self._scale, self._gradients = scale, gradients
        self._borders = Borders(pipeline.group, pipeline.schedule)
        self._live: dict[tuple[int, int], _Live] = {}
        self._kept: dict[tuple[int, int], Kept] = {}
        self.loss = torch.zeros((), dtype=torch.float64, device=pipeline.device)

    def expect(self, action: Action | Fused) -> None:
        """Post the receives that an action will need, once."""
        for part in action.parts:
            if part.kind != WEIGHT:
                stage, microbatch = self._of(part)
                shape = stage.hidden_shape(microbatch)
                self._borders.expect(part, shape, stage.dtype, self._pipeline.device)

    def take(self, part: Action) -> Tensor | None:
        """What an action needs of other stages, once it is there."""
        return None if part.kind == WEIGHT else self._borders.take(part)

    def carry_out(self, part: Action, x: Tensor | None, is_last: bool) -> None:
        """Do one action; ``is_last``: none after it writes gradients of its chunk."""
        if part.kind == FORWARD:
            self._forward(part, x)
        elif part.kind == BACKWARD:
            self._backward(part, x, is_last)
        else:
            self._weight(part, is_last)

    def finish(self) -> None:
        self._borders.finish()
        assert not self._live and not self._kept, "a schedule that leaves something undone"

    def _of(self, part: Action) -> tuple[Stage, Microbatch]:
        return self._pipeline.stages[part.chunk], self._microbatches[part.microbatch]

    def _forward(self, part: Action, x: Tensor | None) -> None:
        stage, microbatch = self._of(part)
        if x is not None:
            x.requires_grad_()
        gradients = []
        with self._pipeline.context():
            y, extra = stage(microbatch.inputs_Bt if x is None else x, microbatch)
            if self._pipeline.is_last(part.chunk):
                y = stage.losses(y, microbatch).sum() / self._num_tokens
                self.loss += y.detach()
                gradients.append(torch.full_like(y, self._scale))
            else:
                self._borders.give(part, y.detach())
        roots = [get_gradient_edge(y)]
        if extra is not None:
            roots.append(get_gradient_edge(extra))
            gradients.append(torch.full_like(extra, self._scale / self._num_sequences))
        self._live[part.microbatch, part.chunk] = _Live(x, roots, gradients)

    def _backward(self, part: Action, gradient: Tensor | None, is_last: bool) -> None:
        stage, _ = self._of(part)
        splits = self._pipeline.schedule.splits
        x, roots, gradients = self._live.pop((part.microbatch, part.chunk))
        if gradient is not None:
            gradients = [gradient, *gradients]
        if splits:
            stage.deferred.begin()
        with self._gradients.writing(part.chunk, last=is_last, complete=not splits):
            torch.autograd.backward(roots, gradients)
        if splits:
            self._kept[part.microbatch, part.chunk] = stage.deferred.end()
        if x is not None:
            assert x.grad is not None, "a stage uses what it is given"
            self._borders.give(part, x.grad)

    def _weight(self, part: Action, is_last: bool) -> None:
        kept = self._kept.pop((part.microbatch, part.chunk))
        deferred = {parameter for parameter, _ in kept}
        with self._gradients.writing(part.chunk, last=is_last, deferred=deferred):
            for parameter, compute in kept:
                self._gradients.add(parameter, compute())


def _last_writes(actions: Actions, splits: bool) -> set[Action]:
    """The last action of each chunk that writes gradients."""
    kind = WEIGHT if splits else BACKWARD
    parts = [part for action in actions for part in action.parts if part.kind == kind]
    return set({part.chunk: part for part in parts}.values())
