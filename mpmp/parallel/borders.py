"""What crosses the borders between stages: hidden states forwards, gradients backwards.

rank 0   [stage 0]      [stage 3]      a neighbour on another rank gets a message,
rank 1   [stage 1]      [stage 2]      one on the same rank (the turn of a V) the tensor itself
               '---------'
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpmp.comm.group import Group
from mpmp.comm.transfer import Transfer
from mpmp.programs.steps import FORWARD, Action, Schedule

TAGS = 32_000
"""Tags of messages between stages are below; others of the pipeline's group are beyond."""


class Borders:
    """One rank's borders during one passage of microbatches.

    Every transfer is named by the action that needs it. ``expect`` posts its receive, ``take``
    gives what has come, ``give`` hands on what an action has made, ``finish`` waits for what is
    still being sent.
    """

    def __init__(self, group: Group, schedule: Schedule) -> None:
        self._group, self._schedule = group, schedule
        self._stages = schedule.chunks * group.size
        self._coming: dict[Action, tuple[Tensor, Transfer | None]] = {}
        self._sends: list[Transfer] = []

    def expect(
        self, action: Action, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Post the receive that an F or B will need, once; nothing where no message comes."""
        place = self._beside(action, -1)
        if place is None or place[0] == self._group.rank or action in self._coming:
            return
        buffer = torch.empty(shape, dtype=dtype, device=device)
        tag = self._tag(action, self._stage(action))
        self._coming[action] = buffer, self._group.receive(buffer, place[0], tag)

    def take(self, action: Action) -> Tensor | None:
        """What an F or B needs of the stage beside, once it is there; None at an end."""
        if self._beside(action, -1) is None:
            return None
        tensor, transfer = self._coming.pop(action)
        if transfer is not None:
            transfer.wait()
        return tensor

    def give(self, action: Action, tensor: Tensor) -> None:
        """Hand what an F or B has made to the stage beside, if there is one."""
        place = self._beside(action, 1)
        if place is None:
            return
        rank, chunk = place
        needing = Action(action.kind, action.microbatch, chunk)
        if rank == self._group.rank:
            self._coming[needing] = tensor, None
            return
        # What has arrived need not be kept alive any longer.
        self._sends = [transfer for transfer in self._sends if not transfer.done()]
        tag = self._tag(action, self._schedule.stage_of(rank, chunk, self._group.size))
        self._sends.append(self._group.send(tensor.contiguous(), rank, tag))

    def finish(self) -> None:
        """Return when all that was sent has left its memory."""
        for transfer in self._sends:
            transfer.wait()
        assert not self._coming, f"nobody took what came for {list(self._coming)}"

    def _stage(self, action: Action) -> int:
        return self._schedule.stage_of(self._group.rank, action.chunk, self._group.size)

    def _beside(self, action: Action, step: int) -> tuple[int, int] | None:
        """(rank, chunk) of the stage one ``step`` along the way of an F or B; None past an end."""
        stage = self._stage(action) + (step if action.kind == FORWARD else -step)
        if not 0 <= stage < self._stages:
            return None
        return self._schedule.place_of(stage, self._group.size)

    def _tag(self, action: Action, stage: int) -> int:
        """Of what goes to ``stage``, the same on both sides.

        Tags come round again after thousands of microbatches; messages of one tag are told apart
        by their order.
        """
        number = action.microbatch * self._stages + stage
        return (2 * number + (action.kind == FORWARD)) % TAGS
