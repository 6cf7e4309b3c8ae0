"""Window programs carried out on a lane, step by step.

The steps run in C (``kernels/mpmp_kernels/window.c``); without a compiler here, in Python, which is
also the reference of what they mean. Neither waits for long: a call that is WAITING is asked to go
on again by whoever waits for it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from mpmp_kernels import build
from mpmp_kernels.build import LINE_BYTES
from mpmp_kernels.reference import sum_publish
from numpy.typing import NDArray
from torch import Tensor

from mpmp.comm import lane as lanes
from mpmp.comm.lane import KERNELS, Lane
from mpmp.programs.windows import ALL, RESULT, RESULT_AND_SLOT

# As in window.c.
LOAD, PUBLISH, AWAIT, COMBINE, COPY = range(5)
DONE, WAITING, COMBINE_ELSEWHERE, NOT_ALIKE, NOT_ALL_IN_WINDOWS = range(5)
_NO_KERNEL = len(KERNELS)

Step = tuple[int, int, int, int, int, int]
"""kind, source, target, first element in input and result, and in a buffer, number of elements"""

Patience = tuple[ctypes.c_int64, ctypes.c_int64]
"""How often a rank that waits looks again at once, and how often it yields the core between."""
AT_ONCE: Patience = (ctypes.c_int64(0), ctypes.c_int64(0))


class WindowCall:
    """A window program lowered to elements, to be carried out on a lane again and again."""

    def __init__(
        self,
        lane: Lane,
        steps: Sequence[Step],
        dtype: torch.dtype,
        signature: int,
        divide: float,
        combine: Callable[[list[Tensor], list[Tensor]], None] | None,
    ) -> None:
        """``combine(sources, targets)`` takes the place of the sum where the operation is none."""
        self.lane, self.dtype, self.steps = lane, dtype, list(steps)
        self._divide, self._combine = divide, combine
        flat = [word for step in steps for word in step]
        self._steps = (ctypes.c_int64 * max(1, len(flat)))(*flat)
        self._buffers = (ctypes.c_uint64 * lane.size)()
        self._pointers = (ctypes.c_uint64 * (2 * lane.size + 1))()
        self.struct = build.Call(
            lane=ctypes.pointer(lane.struct),
            steps=ctypes.addressof(self._steps),
            num_steps=len(self.steps),
            dtype=_NO_KERNEL if combine else KERNELS.get(dtype, _NO_KERNEL),
            itemsize=dtype.itemsize,
            divide=divide,
            signature=signature,
            offset=-1,
            buffers=ctypes.addressof(self._buffers),
            pointers=ctypes.addressof(self._pointers),
        )
        found = lanes.kernels()
        self._address = ctypes.c_void_p(ctypes.addressof(self.struct))
        self._run = self._run_in_python if found is None else found.mpmp_run

    def place(self, offset: int) -> None:
        """Where the next run finds its buffer: in this rank's share, or -1."""
        self.struct.offset = offset

    def bind(self, source: Tensor, result: Tensor) -> None:
        """The private memory of the next run through slots; both may be the same."""
        self.struct.input, self.struct.result = source.data_ptr(), result.data_ptr()

    def use_slots(self) -> None:
        """Let its pieces pass through the two slots of the lane, in turns."""
        self.struct.slot_bytes = self.lane.slot_bytes
        self.struct.offset = self.lane.slots[0]

    def advance(self, patience: Patience) -> int:
        """Go on; DONE, WAITING (for ``awaited``), NOT_ALIKE or NOT_ALL_IN_WINDOWS."""
        while True:
            outcome: int = self._run(self._address, *patience)
            if outcome != COMBINE_ELSEWHERE:
                return outcome
            self._carry_out(self.steps[self.struct.at])
            self.struct.at += 1

    @property
    def awaited(self) -> int:
        """The rank of the group that a call which is WAITING waits for."""
        return int(self.struct.awaited)

    @property
    def met(self) -> bool:
        """Whether all ranks have come to the call that is under way."""
        return bool(self.struct.met)

    # --- the same in Python ---------------------------------------------------------------------

    def _carry_out(self, step: Step) -> None:
        """A COMBINE or COPY on tensors over everybody's buffers."""
        kind, source, target, start, place, count = step
        first, published = start * self.dtype.itemsize, self.struct.published
        there = self._place(place, published - 1)
        buffers = [address + there for address in self._buffers]
        if self.struct.slot_bytes:  # what this rank has loaded stands where it was
            buffers[self.lane.struct.rank] = self.struct.input + first
        sources = [self._view(at, count) for r, at in enumerate(buffers) if source in (ALL, r)]
        targets = [self._view(at, count) for r, at in enumerate(buffers) if target in (ALL, r)]
        if target in (RESULT, RESULT_AND_SLOT):
            targets.append(self._view(self.struct.result + first, count))
        if target == RESULT_AND_SLOT:
            slot = self._buffers[self.lane.struct.rank] + self._place(place, published)
            targets.append(self._view(slot, count))
        if kind == COPY:
            for one in targets:
                one.copy_(sources[0])
        elif self._combine is not None:
            self._combine(sources, targets)
        else:
            sum_publish(sources, targets, self._divide)

    def _place(self, place: int, published: int) -> int:
        """Bytes from the beginning of a buffer to an element, after as many publications."""
        turn: int = (self.lane.struct.base + published) & 1
        slot_bytes: int = self.struct.slot_bytes
        return turn * slot_bytes + place * self.dtype.itemsize

    def _view(self, address: int, count: int) -> Tensor:
        memory = (ctypes.c_char * (count * self.dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=self.dtype)

    def _run_in_python(self, _: object, spins: ctypes.c_int64, yields: ctypes.c_int64) -> int:
        """``mpmp_run`` of window.c, its reference."""
        call, lane = self.struct, self.lane
        while call.at < len(self.steps):
            kind, source, _, start, place, count = self.steps[call.at]
            if kind == LOAD:
                if count:  # nothing at all has no address
                    slot = lane.shares[lane.struct.rank] + call.offset
                    slot += self._place(place, call.published)
                    first = call.input + start * call.itemsize
                    ctypes.memmove(slot, first, count * call.itemsize)
            elif kind == PUBLISH:
                self._publish()
            elif kind == AWAIT:
                for rank in range(call.awaited, lane.size):
                    call.awaited = rank
                    if source in (ALL, rank) and not self._has_published(rank, yields.value):
                        return WAITING
                call.awaited = 0
                call.met += 1
                outcome = self._meet() if call.met == 1 else DONE
                if outcome != DONE:
                    self._end()
                    return outcome
            elif count > 0:
                return COMBINE_ELSEWHERE
            call.at += 1
        self._end()
        return DONE

    def _line(self, rank: int) -> NDArray[np.int64]:
        words = (ctypes.c_int64 * (LINE_BYTES // 8)).from_address(self.lane.lines[rank])
        return np.asarray(memoryview(words).cast("B").cast("q"))

    def _publish(self) -> None:
        call, lane = self.struct, self.lane
        own, header = self._line(lane.struct.rank), 8 + 8 * (lane.struct.turn & 1)
        if call.published == 0:
            own[header] = call.offset
            own[header + 1] = np.uint64(call.signature).astype(np.int64)
        call.published += 1
        _fence()
        own[0] = lane.struct.base + call.published

    def _has_published(self, rank: int, yields: int) -> bool:
        line, wanted = self._line(rank), self.lane.struct.base + self.struct.published
        for _ in range(yields + 1):
            if line[0] >= wanted:
                _fence()
                return True
            os.sched_yield()
        return False

    def _meet(self) -> int:
        call, lane = self.struct, self.lane
        header, missing = 8 + 8 * (lane.struct.turn & 1), False
        for rank in range(lane.size):
            offset, signature = self._line(rank)[header : header + 2]
            if signature.astype(np.uint64) != call.signature:
                call.stranger = rank
                return NOT_ALIKE
            missing |= bool(offset < 0)
            self._buffers[rank] = lane.shares[rank] + int(offset) if offset >= 0 else 0
        return NOT_ALL_IN_WINDOWS if missing else DONE

    def _end(self) -> None:
        call, lane = self.struct, self.lane.struct
        lane.base += call.published
        lane.turn += 1
        call.at = call.published = call.awaited = call.met = 0


def _fence() -> None:
    """Order memory both ways: a lock taken is at least an acquire, one given back a release."""
    for _ in range(2):
        with _LOCK:
            pass


_LOCK = threading.Lock()
