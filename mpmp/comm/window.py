"""Windows: collectives on tensors that live in memory shared by the ranks of a host.

A tensor in a share is combined where it lies; each call says where that is, so nothing has to be
registered. Any other tensor passes through two slots, in pieces. Progress is made by whoever
waits: ``start`` says that this rank has arrived, ``wait`` sums.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from mpmp.comm.buffer import load
from mpmp.comm.executor import refuse
from mpmp.comm.lane import Lane
from mpmp.comm.mpi import MPI
from mpmp.comm.reductions import Reduction
from mpmp.comm.share import CURE, Shares
from mpmp.comm.spec import Spec
from mpmp.comm.window_call import AT_ONCE, DONE, NOT_ALIKE, WAITING, Patience, WindowCall
from mpmp.comm.window_operation import Places, WindowOperation
from mpmp.comm.window_plan import (
    copy_spans,
    cut,
    lower,
    meeting,
    pieces,
    program_in_slots,
    window_algorithm,
)
from mpmp.comm.world import World
from mpmp.errors import LaunchError, PeerError
from mpmp.programs.windows import PIECE_BYTES

SLOT_BYTES = PIECE_BYTES
_SPINS, _YIELDS = 2000, 20


class Windows:
    """What the ranks of a group that share a host do in shared memory."""

    MOST_CALLS = 256

    def __init__(
        self,
        world: World,
        shares: Shares,
        comm: MPI.Intracomm,
        ranks: Sequence[int],
        name: str,
        demanded: bool = False,
    ) -> None:
        self.world, self.shares, self.comm, self.ranks, self.name = world, shares, comm, ranks, name
        self._demanded = demanded
        self.size, self.slot_bytes = len(ranks), SLOT_BYTES
        # With more ranks than cores a spinning rank would keep the one it waits for from running.
        crowded = world.ranks_on_host > len(os.sched_getaffinity(0))
        self.patience: Patience = (
            ctypes.c_int64(0 if crowded else _SPINS),
            ctypes.c_int64(_YIELDS),
        )
        self._lane: Lane | None = None
        self._asked = False
        self._calls: OrderedDict[Hashable, WindowCall] = OrderedDict()
        self._started: deque[WindowOperation] = deque()
        self._broken: Spec | None = None
        self.retired: list[Lane] = []
        """Lanes that a slow rank may still read: dropped when all have met once more."""

    def ready(self) -> bool:
        """Whether the group has its lane; opened at the first call, which all ranks make."""
        if not self._asked:
            self._asked = True
            self._lane = self.open_lane(self.slot_bytes)
            if self._lane is None:
                self._no_room(f"group {self.name} sends messages, which is slower")
        return self._lane is not None

    def open_lane(self, slot_bytes: int) -> Lane | None:
        """A lane of the group, or None without room; all ranks together."""
        lane = Lane.open(self.world, self.shares, self.comm, self.ranks, slot_bytes)
        if lane is not None:
            self.shares.kept.append(lane)
        return lane

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised tensor in this rank's share, or None where there is no room."""
        length = 1
        for extent in shape:
            length *= extent
        memory = self.shares.empty(length * dtype.itemsize)
        if memory is None:
            nbytes = length * dtype.itemsize
            self._no_room(f"a tensor of {nbytes:,} bytes is copied in and out, which is slower")
            return None
        return memory.view(dtype).view(tuple(shape))

    def _no_room(self, consequence: str) -> None:
        """One line a host, or an error where shared memory was demanded."""
        said = f"/dev/shm has no room left, so {consequence}; {CURE}"
        if self._demanded:
            raise LaunchError(f"{said}; or take --comm.windows auto")
        if self.shares.is_first():
            print(f"[{self.world.name}] {said}", file=sys.stderr, flush=True)

    def agree(self, spec: Spec) -> None:
        """Raise TensorError on every rank where the ranks bring different specs."""
        self.reachable(spec, 0)

    def reachable(self, spec: Spec, offset: int) -> bool:
        """The same; whether all ranks' buffers lie in their shares: ``offset`` is this one's."""
        assert self._lane is not None
        self.settle()
        retired = list(self.retired)
        call = meeting(spec, self._lane)
        call.place(offset)
        found = self.finish(call, spec) == DONE
        self._drop(retired)  # all ranks have come here, so none is in them
        return found

    def carry_out(
        self, spec: Spec, reduction: Reduction, x: Tensor, at: int, result: Tensor, start: int
    ) -> None:
        """Run on a buffer that holds ``x`` from ``at`` on; fill ``result`` from ``start`` on."""
        self.settle()
        self.follow(spec, reduction, x, at, result, start)

    def follow(
        self,
        spec: Spec,
        reduction: Reduction,
        x: Tensor,
        at: int,
        result: Tensor,
        start: int,
        in_place: bool = True,
    ) -> None:
        """``carry_out`` of a call whose turn it is; ``in_place`` unless all know that it fails."""
        retired = list(self.retired)
        if not result.is_inference():
            torch.autograd.graph.increment_version(result)  # autograd does not see what C stores
        # Asked of the spec, not of the tensor: all ranks must take the same way.
        in_place &= not window_algorithm(spec).slots and spec.collective != "reduce_scatter"
        if in_place:
            offset = self.shares.offset(result)
            if offset >= 0:
                load(result[at : at + x.numel()], x)
            call = self._call(spec, reduction, spec.algorithm, spec.bounds)
            call.place(offset)
            if self.finish(call, spec) == DONE:
                self._drop(retired)
                return
        self._in_pieces(spec, reduction, x, at, result, start)
        self._drop(retired)

    def _in_pieces(
        self, spec: Spec, reduction: Reduction, x: Tensor, at: int, result: Tensor, start: int
    ) -> None:
        """The same through the slots, for memory that the others cannot reach."""
        assert self._lane is not None
        name = program_in_slots(spec, self.size)
        if name is not None:
            call = self._call(spec, reduction, name, pieces(spec, name, self._lane))
            call.bind(x, result)
            self.finish(call, spec)
            return
        lane, slot = self._lane, self._lane.slot_bytes // spec.dtype.itemsize
        silent = spec.collective == "broadcast" and dict(spec.facts)["root"] != self.comm.rank
        for spans in cut(spec.bounds, slot):
            bounds = [0]
            for low, high in spans:
                bounds.append(bounds[-1] + high - low)
            call = self._call(spec, reduction, spec.algorithm, tuple(bounds))
            offset = lane.next_slot()
            buffer = self._slot(offset, bounds[-1], spec.dtype)
            if not silent:
                copy_spans(spans, bounds, x, at, lambda piece, there: there.copy_(piece), buffer)
            call.place(offset)
            self.finish(call, spec)
            copy_spans(
                spans, bounds, result, start, lambda piece, there: piece.copy_(there), buffer
            )

    def prepare(
        self, spec: Spec, reduction: Reduction, x: Tensor, places: Places
    ) -> WindowOperation:
        """A collective in place on ``x``, to be run or started many times; see started.Prepared."""
        return WindowOperation(self, spec, reduction, x, places)

    def finish(self, call: WindowCall, spec: Spec, outcome: int = WAITING) -> int:
        """Carry a call to its end; TensorError on all ranks where they are not alike."""
        if self._broken is not None:
            raise PeerError(
                f"group {self.name} gave up in the middle of {self._broken}; its ranks cannot "
                "meet in shared memory again"
            )
        try:
            if outcome == WAITING:
                outcome = call.advance(self.patience)
            if outcome == WAITING:
                outcome = self._wait(call, spec)
        except BaseException:
            self.give_up(call, spec)
            raise
        if outcome == NOT_ALIKE:
            refuse(self.world, self.comm, self.ranks, self.name, spec)
        return outcome

    def give_up(self, call: WindowCall, spec: Spec) -> None:
        """Meet no more: a call ended half-way, and others may still store to its memory."""
        self._broken = spec
        self.shares.kept.append(call)

    def retire(self, lane: Lane) -> None:
        """Let a lane go that a slow rank may still read; a finaliser may call this anywhere."""
        if self._lane is None:  # freed: nobody reads any more
            self.shares.kept.remove(lane)
        else:
            self.retired.append(lane)

    def free(self) -> None:
        """Give the lanes' memory back; all ranks of the group together."""
        if self._lane is None:
            return
        self.settle()
        self.world.wait([self.comm.Ibarrier()], lambda: f"all ranks of group {self.name} to end")
        self._drop(list(self.retired))
        self.shares.kept.remove(self._lane)
        self._lane, self._asked = None, False
        self._calls.clear()

    def drive(self, operation: WindowOperation) -> None:
        """Finish what was started, in the order of the starts, until this one is done."""
        while operation in self._started:
            self._started.popleft().complete()
        if not self._started:
            self.world.meanwhile.pop(self, None)

    def settle(self) -> None:
        """Finish all that was started, for others may wait for it before they come to this call."""
        if self._started:
            self.drive(self._started[-1])

    def enqueue(self, operation: WindowOperation) -> None:
        self._started.append(operation)
        self.world.meanwhile[self] = self._go_on

    def _go_on(self) -> None:
        """Carry what was started on, while this rank waits for something else."""
        for operation in self._started:
            if not operation.go_on():
                return

    # --- inside -----------------------------------------------------------------------------------

    def _wait(self, call: WindowCall, spec: Spec) -> int:
        outcome = WAITING

        def ready() -> bool:
            nonlocal outcome
            # Once all have met they are at the same work, and nobody is late for long.
            outcome = call.advance(self.patience if call.met else AT_ONCE)
            return outcome != WAITING

        self.world.until(
            ready,
            lambda: (
                f"rank {self.ranks[call.awaited]} in {spec.collective}/{spec.algorithm} "
                f"on group {self.name}"
            ),
            lambda: (self.ranks[call.awaited],),
        )
        return outcome

    def _call(
        self, spec: Spec, reduction: Reduction, name: str, bounds: tuple[int, ...]
    ) -> WindowCall:
        key = (spec, reduction, name, bounds)
        if key in self._calls:
            self._calls.move_to_end(key)
            return self._calls[key]
        assert self._lane is not None
        call = self._calls[key] = lower(spec, reduction, name, bounds, self._lane, self.comm.rank)
        if len(self._calls) > self.MOST_CALLS:
            self._calls.popitem(last=False)
        return call

    def _slot(self, offset: int, length: int, dtype: torch.dtype) -> Tensor:
        address = self.shares.base[self.ranks[self.comm.rank]] + offset
        memory = (ctypes.c_char * max(1, length * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8)[: length * dtype.itemsize].view(dtype)

    def _drop(self, lanes: list[Lane]) -> None:
        for lane in lanes:
            self.retired.remove(lane)
            self.shares.kept.remove(lane)
