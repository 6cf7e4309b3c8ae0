"""Collectives in windows that are prepared once and run, or started and waited for, many times."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpmp.comm.reductions import Reduction
from mpmp.comm.spec import Spec
from mpmp.comm.window_call import AT_ONCE, DONE, WAITING, Patience, WindowCall
from mpmp.comm.window_plan import lower, pieces, program_in_slots, slot_bytes, window_algorithm
from mpmp.errors import TensorError

if TYPE_CHECKING:
    from mpmp.comm.window import Windows

Places = tuple[tuple[int, int], tuple[int, int]]
"""Where in a buffer a rank's contribution and its result begin and end."""


class WindowOperation:
    """A collective in place on memory that stays, with a lane of its own; run it again and again.

    ``run`` carries it out; ``start`` says that this rank has arrived and ``wait`` does the rest.
    """

    def __init__(
        self, windows: Windows, spec: Spec, reduction: Reduction, x: Tensor, places: Places
    ) -> None:
        self.windows, self.spec, self.reduction = windows, spec, reduction
        (at, end), (start, stop) = places
        self.input, self.output = x[at:end], x[start:stop]
        self._places = at, start
        self._retire: Callable[[], object] = lambda: None
        offset = windows.shares.offset(x)
        everywhere = windows.reachable(spec, offset)  # before anything of it is opened
        self._in_place = everywhere and not window_algorithm(spec).slots
        self._call: WindowCall | None = None
        self._seen = not self._in_place and not x.is_inference()
        in_slots = None if self._in_place else program_in_slots(spec, windows.size)
        if in_slots or self._in_place:
            room = min(slot_bytes(spec, windows.size), windows.slot_bytes) if in_slots else 0
            lane = windows.open_lane(room)
            if lane is not None:
                self._retire = weakref.finalize(self, windows.retire, lane)
                name = in_slots or spec.algorithm
                bounds = pieces(spec, name, lane) if in_slots else spec.bounds
                self._call = lower(spec, reduction, name, bounds, lane, windows.comm.rank)
                if in_slots:
                    self._call.bind(x, x)
                else:
                    self._call.place(offset)
        self._outcome = DONE
        self._freed = False

    def run(self) -> None:
        """Carry it out at once."""
        self.windows.settle()
        self.begin(self.windows.patience)
        if self._outcome != DONE:
            self.complete()

    def start(self) -> WindowOperation:
        """Arrive; what is started is finished in the order of the starts."""
        self.windows.drive(self)  # where it was started before and not waited for
        self.begin(AT_ONCE)
        self.windows.enqueue(self)
        return self

    def wait(self) -> float:
        """Return when it is done; the seconds that took."""
        began = time.perf_counter()
        self.windows.drive(self)
        return time.perf_counter() - began

    def begin(self, patience: Patience) -> None:
        call = self._call
        if call is None:
            if self._freed:
                raise TensorError(f"{self.spec} was freed; prepare it anew")
            self._outcome = WAITING
            return
        if self._seen:
            torch.autograd.graph.increment_version(self.output)  # autograd does not see C's stores
        try:
            self._outcome = call.advance(patience)
        except BaseException:
            self._give_up(call)
            raise

    def go_on(self) -> bool:
        """Do what can be done without waiting; whether it is done."""
        if self._call is not None and self._outcome == WAITING:
            try:
                self._outcome = self._call.advance(AT_ONCE)
            except BaseException:
                self._give_up(self._call)
                raise
        return self._outcome == DONE

    def complete(self) -> None:
        """Wait for the others and do what is left."""
        if self._outcome != DONE and self._call is not None:
            call, self._call = self._call, None  # gone, where it ends half-way
            self.windows.finish(call, self.spec, self._outcome)
            self._call = call
        elif self._outcome != DONE:  # each by itself, in the lane of the group
            (at, start), windows = self._places, self.windows
            windows.follow(
                self.spec, self.reduction, self.input, at, self.output, start, self._in_place
            )
        self._outcome = DONE

    def free(self) -> None:
        """Let its lane go; it must not be used afterwards."""
        self.windows.drive(self)
        self._call, self._freed = None, True
        self._retire()

    def _give_up(self, call: WindowCall) -> None:
        """After an error of a function of the user's, in the middle."""
        self.windows.give_up(call, self.spec)
        self._call = None
