"""One pipeline stage that carries out any schedule.

    stage 0   F0 F1 F2       B0 F3 B1    B2    B3       F  takes hidden states from the stage
    stage 1      F0 F1    B0 F2 B1 F3 B2    B3             before, gives its own to the next
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3             B  takes the gradient from the stage
                                                           behind, gives its own to the one before

Each stage owns its own graph: hidden states enter as leaves, and gradients are handed over as
tensors. A receive is posted one action ahead, so that it is under way while the stage computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpmp.comm.mesh import Mesh
from mpmp.comm.transfer import Transfer
from mpmp.parallel.data import GradientBuckets
from mpmp.programs import schedules
from mpmp.programs.steps import BACKWARD, FORWARD, Action


@dataclass(frozen=True)
class Microbatch:
    """A piece of a replica's batch: (B, T) tokens and targets, and the samples' numbers (B)."""

    inputs: Tensor
    targets: Tensor
    samples: Tensor


class Stage(Protocol):
    """What a model must offer to be a stage; see models/gpt.py."""

    width: int
    dtype: torch.dtype

    def __call__(self, x: Tensor, samples_B: Tensor | None = None) -> Tensor: ...

    def token_losses(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor: ...


class Pipeline:
    """Runs microbatches through the stages of one replica.

    ``context`` gives the arithmetic of a forward (an autocast, or nothing).
    """

    def __init__(
        self,
        mesh: Mesh,
        stage: Stage,
        schedule: str,
        context: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._group, self._stage, self._context = mesh.pipeline, stage, context
        self._first, self._last = mesh.is_first_stage, mesh.is_last_stage
        self._schedule = schedules.find(schedule)
        self._device = mesh.world.device

    def train(
        self, microbatches: Sequence[Microbatch], num_tokens: int, buckets: GradientBuckets
    ) -> Tensor:
        """Forward and backward of all microbatches; gradients are summed into the buckets.

        The loss is the sum of this replica's token losses over ``num_tokens``, the tokens of the
        whole global batch, so that sums over replicas need no further scale. Returns it as a
        scalar, zero on all but the last stage.
        """
        group = self._group
        actions = list(self._schedule(group.rank, group.size, len(microbatches)))
        last_backward = max(n for n, action in enumerate(actions) if action.kind == BACKWARD)
        step = _Step(self, microbatches, num_tokens)
        buckets.expect()
        step.post(actions[0])
        for number, action in enumerate(actions):
            if number + 1 < len(actions):
                step.post(actions[number + 1])
            if number == last_backward:
                buckets.last_microbatch()
            if action.kind == FORWARD:
                step.forward(action.microbatch)
            else:
                step.backward(action.microbatch)
        step.wait_for_sends()
        buckets.finish()
        return step.loss

    @torch.no_grad()
    def score(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of a batch's token losses without dropout, on the last stage; zero on the others."""
        hidden = self.hidden(inputs)
        if not self._last:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        with self._context():
            return self._stage.token_losses(hidden, targets).double().sum()

    @torch.no_grad()
    def hidden(self, inputs: Tensor) -> Tensor:
        """This stage's hidden states (B, T, D) for tokens (B, T), sent on to the next stage."""
        B, T = inputs.shape
        x = inputs
        if not self._first:
            x = self._empty(B, T)
            self._group.receive(x, self._group.rank - 1, 0).wait()
        with self._context():
            hidden = self._stage(x)
        if not self._last:
            self._group.send(hidden, self._group.rank + 1, 0).wait()
        return hidden

    def _empty(self, B: int, T: int) -> Tensor:
        return torch.empty(B, T, self._stage.width, dtype=self._stage.dtype, device=self._device)


class _Step:
    """What one stage holds while one step's microbatches pass."""

    def __init__(
        self, pipeline: Pipeline, microbatches: Sequence[Microbatch], num_tokens: int
    ) -> None:
        self._pipeline, self._microbatches, self._num_tokens = pipeline, microbatches, num_tokens
        self._group = pipeline._group
        self._posted: dict[Action, tuple[Tensor, Transfer]] = {}
        self._live: dict[int, tuple[Tensor, Tensor]] = {}
        self._sends: list[Transfer] = []
        self.loss = torch.zeros((), dtype=torch.float64, device=pipeline._device)

    def post(self, action: Action) -> None:
        """Post the receive that an action will need, once."""
        forward = action.kind == FORWARD
        needs_none = self._pipeline._first if forward else self._pipeline._last
        if needs_none or action in self._posted:
            return
        B, T = self._microbatches[action.microbatch].inputs.shape
        buffer = self._pipeline._empty(B, T)
        source = self._group.rank + (-1 if forward else 1)
        self._posted[action] = buffer, self._group.receive(buffer, source, _tag(action))

    def forward(self, number: int) -> None:
        microbatch = self._microbatches[number]
        x = microbatch.inputs
        if not self._pipeline._first:
            x = self._received(Action(FORWARD, number)).requires_grad_()
        stage = self._pipeline._stage
        with self._pipeline._context():
            y = stage(x, microbatch.samples)
            if self._pipeline._last:
                losses = stage.token_losses(y, microbatch.targets)
                y = losses.sum() / self._num_tokens
                self.loss += y.detach()
        self._live[number] = x, y
        if not self._pipeline._last:
            self._send(y.detach(), Action(FORWARD, number))

    def backward(self, number: int) -> None:
        x, y = self._live.pop(number)
        gradient = None
        if not self._pipeline._last:
            gradient = self._received(Action(BACKWARD, number))
        torch.autograd.backward(y, gradient)
        if not self._pipeline._first:
            assert x.grad is not None
            self._send(x.grad, Action(BACKWARD, number))

    def wait_for_sends(self) -> None:
        for transfer in self._sends:
            transfer.wait()

    def _received(self, action: Action) -> Tensor:
        buffer, transfer = self._posted.pop(action)
        transfer.wait()
        return buffer

    def _send(self, tensor: Tensor, action: Action) -> None:
        to = self._group.rank + (1 if action.kind == FORWARD else -1)
        # What has arrived need not be kept alive any longer.
        self._sends = [transfer for transfer in self._sends if not transfer.done()]
        self._sends.append(self._group.send(tensor.contiguous(), to, _tag(action)))


def _tag(action: Action) -> int:
    return 2 * action.microbatch + (action.kind == BACKWARD)
