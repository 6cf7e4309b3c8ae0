"""What carries a group's calls: the choice of an algorithm, executors for messages, windows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpmp.comm import reductions
from mpmp.comm.arguments import lengths_for, root_of
from mpmp.comm.bridge import Bridge, Bridged
from mpmp.comm.buffer import admit, load
from mpmp.comm.device_path import DeviceWays
from mpmp.comm.executor import Executor
from mpmp.comm.mpi import MPI
from mpmp.comm.plan import Plan
from mpmp.comm.progress import Progress
from mpmp.comm.reductions import REDUCTIONS, Op, Reduction
from mpmp.comm.selection import FREELY_CUT, REDUCING, ROOTED, Call, Selection
from mpmp.comm.spec import Spec
from mpmp.comm.started import Prepared, Replay, keep_own
from mpmp.comm.transfer import Transfer
from mpmp.comm.window import Windows
from mpmp.config import Comm
from mpmp.programs import collectives
from mpmp.programs.partition import partition
from mpmp.programs.tables import look_up
from mpmp.programs.windows import WindowAlgorithm

SLOT_BYTES = 256 * 1024
"""Up to here a copy into a prepared staging slot is cheaper than preparing requests anew."""


class Carrier:
    """Ranks of one axis (or several) of the mesh, and the ways between them.

    ``rank`` is this rank's place in the group, ``ranks`` all members by their rank in the world,
    ``hosts`` the number of the host of each, ``spent_s`` the seconds this rank has spent here,
    waiting included (buckets of gradients and ZeRO's weights count their own). ``table`` is one of
    measurements.
    """

    def __init__(
        self,
        now: Executor,
        started: Executor,
        progress: Progress,
        settings: Comm,
        hosts: tuple[int, ...],
        table: Any = None,
    ) -> None:
        self._now, self._started, self._progress = now, started, progress
        self.name, self.ranks, self.hosts = now.name, now.ranks, hosts
        self.rank, self.size = now.comm.rank, now.comm.size
        self._overlap = settings.overlap
        self._selection = Selection(settings, self.name, self.rank, hosts, table)
        self.windows: Windows | None = None
        """Memory that all ranks of the group share, where they do."""
        self._device_ways: DeviceWays | None = None
        self.windows_reason = "its ranks share no memory"
        """Why there are no windows."""
        self.bridge: Bridge | None = None
        """Carries allreduce "hierarchical" where hosts are alike and their ranks share memory."""

    def share(self, windows: Windows | None, reason: str) -> None:
        """Use these windows from now on, or none for a reason; alike on all ranks."""
        self.windows, self.windows_reason = windows, reason

    def __repr__(self) -> str:
        return f"Group({self.name}, rank {self.rank} of {self.ranks})"

    @property
    def spent_s(self) -> float:
        return self._now.spent_s

    @property
    def overlaps(self) -> bool:
        """Whether what is started moves while this rank computes, so that layers had better start.

        What is started in shared memory is carried out by whoever waits for it. Over hosts of
        several ranks a bridge moves less between them, and what is started takes no bridge.
        """
        if self.size == 1 or not self._progress.threaded or self.windows is not None:
            return False
        each_its_own_host = len(set(self.hosts)) == self.size
        return {"auto": each_its_own_host, "on": True, "off": False}[self._overlap]

    def note_wait(self, seconds: float) -> None:
        """Count seconds that this rank has waited for what it had started."""
        self._now.spent_s += seconds

    @property
    def communicator(self) -> MPI.Intracomm:
        """The group's own communicator; for ``native.py``, which measures the library itself."""
        return self._now.comm

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """A tensor in memory that the ranks share where there is room, else in ordinary memory."""
        device = torch.device(device)
        windows = self.device_ways.windows if device.type == "cuda" else self.windows
        found: Tensor | None = None if windows is None else windows.empty(shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=device) if found is None else found

    def send(self, x: Tensor, to: int, tag: int) -> Transfer:
        """Start sending to a rank of the group; ``wait`` before the tensor is written again."""
        return Transfer(self._now, admit(x), to, tag, sends=True)

    def receive(self, out: Tensor, source: int, tag: int) -> Transfer:
        """Start receiving from a rank of the group; ``wait`` before the tensor is read."""
        return Transfer(self._now, admit(out), source, tag, sends=False)

    def stop(self) -> None:
        """End the thread that drives started operations, once they are done."""
        self._progress.stop()

    def free(self) -> None:
        """Give the group's communicators back; nothing of it may be used afterwards."""
        if self.bridge is not None:
            self.bridge.free()
        if self.windows is not None:
            self.windows.free()
        for executor in (self._now, self._started):
            executor.free()

    def prepare(
        self,
        collective: str,
        x: Tensor,
        *,
        op: Op = "sum",
        root: int = 0,
        lengths: Sequence[int] | None = None,
        algorithm: str | None = None,
        order: str = "any",
    ) -> Replay:
        """A collective in place on memory that stays, to be run or started many times.

        ``x`` is what the program works on: the whole vector, of which every rank owns the elements
        ``lengths`` (omitted: ``partition(x.numel(), size)``); of an all-to-all the input and the
        output, one after the other. This rank's contribution and result are ``input`` and
        ``output`` of the handle, parts of ``x``.
        """
        look_up(collectives.COLLECTIVES, collective, "collective")
        flat = admit(x)
        length = flat.numel() // 2 if collective == "alltoall" else flat.numel()
        if lengths is None:
            lengths = [stop - start for start, stop in partition(length, self.size)]
        each = tuple(lengths_for(collective, lengths, self.size, length))
        whole = collective in FREELY_CUT or collective == "barrier"
        rooted = root_of(root, self, self.size) if collective in ROOTED else None
        spec, reduction = self._spec(
            collective, (length,) if whole else each, flat, op, algorithm, rooted, order
        )
        places = places_of(spec, self.rank)
        if is_window(spec):
            windows: Replay = self._windows_of(x).prepare(spec, reduction, flat, places)
            return windows
        executors = self._now, self._started
        staged = x.is_cuda and self.device_ways.choose_messages(spec.nbytes) == "staged"
        prepared = Prepared(executors, self._progress, spec, reduction, flat, places, staged)
        if self.bridge is not None and self.bridge.takes(spec, reduction, flat):
            return Bridged(self.bridge, prepared, reduction, flat)
        return prepared

    # --- inside -----------------------------------------------------------------------------------

    def _spec(
        self,
        collective: str,
        lengths: tuple[int, ...],
        x: Tensor,
        op: Op | None,
        algorithm: str | None,
        root: int | None,
        order: str,
    ) -> tuple[Spec, Reduction]:
        """What all ranks must agree on, and what combines."""
        reduction = reductions.NONE
        if collective in REDUCING:
            reduction = reductions.find("sum" if op is None else op, x.dtype)
        call = Call(collective, x.dtype, lengths, reduction.name, algorithm, root, order)
        refusal = self._no_windows(x, reduction)
        if x.is_cuda and not refusal and algorithm in (None, "auto"):
            way = self.device_ways.choose(call.total * x.itemsize)
            refusal = "" if way == "ipc" else f"{way} was measured to be faster"
        spec = self._selection.spec(call, refusal)
        if not refusal and is_window(spec):
            windows = self._windows_of(x)
            if hasattr(windows, "takes") and not windows.takes(spec, x):
                refusal = f"{spec.op} of {x.dtype} has no kernel"
                spec = self._selection.spec(call, refusal)
        return spec, reduction

    @property
    def device_ways(self) -> DeviceWays:
        """How GPU tensors travel; opened at the first one, by all ranks together."""
        if self._device_ways is None:
            now = self._now
            self._device_ways = DeviceWays(
                now.world,
                now.comm,
                self._started.comm,
                self.ranks,
                self.name,
                self._progress,
                self._sum_by_messages,
            )
        return self._device_ways

    def _sum_by_messages(self, way: str, x: Tensor) -> None:
        call = Call("allreduce", x.dtype, (x.numel(),), "sum")
        spec = self._selection.spec(call, "messages are measured")
        self._by_messages(spec, REDUCTIONS["sum"], x, 0, x, 0, way=way)

    def _windows_of(self, x: Tensor) -> Any:
        return self.device_ways.windows if x.is_cuda else self.windows

    def _no_windows(self, x: Tensor, reduction: Reduction) -> str:
        """Why this call cannot use windows, "" where it can; the same on all ranks."""
        if x.is_cuda:
            return "" if self.device_ways.windows is not None else self.device_ways.reason
        if self.windows is not None and not self.windows.ready():
            self.share(None, "/dev/shm has no room for them")
        if self.windows is not None:
            self._now.agree_with = self.windows.agree
        return "" if self.windows is not None else self.windows_reason

    def _carry_out(
        self, spec: Spec, reduction: Reduction, x: Tensor, at: int, result: Tensor, start: int
    ) -> None:
        """Put ``x`` into a buffer at offset ``at``, run, and fill ``result`` from ``start`` on."""
        began = time.perf_counter()
        if is_window(spec):
            self._windows_of(x).carry_out(spec, reduction, x, at, result, start)
        elif self.bridge is not None and self.bridge.takes(spec, reduction, x):
            self.bridge.carry_out(reduction, x, result)
        else:
            self._by_messages(spec, reduction, x, at, result, start)
        self._now.spent_s += time.perf_counter() - began

    def _by_messages(
        self,
        spec: Spec,
        reduction: Reduction,
        x: Tensor,
        at: int,
        result: Tensor,
        start: int,
        plan: Plan | None = None,
        way: str = "",
    ) -> None:
        """``plan`` is one that is used once; ``way`` is how a GPU tensor goes."""
        staged = x.is_cuda and (way or self.device_ways.choose_messages(spec.nbytes)) == "staged"
        operation = None
        if plan is None and spec.nbytes <= SLOT_BYTES and (staged or not x.is_cuda):
            operation = self._now.slot(spec, reduction, pinned=staged)
            buffer = operation.buffer
        else:
            whole = start == 0 and result.numel() == spec.bounds[-1]
            # The result itself serves as the buffer where it has the right type and place.
            if whole and not staged and result.dtype == spec.dtype:
                buffer = result
            else:
                device = "cpu" if staged else x.device
                buffer = torch.empty(
                    spec.bounds[-1], dtype=spec.dtype, device=device, pin_memory=staged
                )
        load(buffer[at : at + x.numel()], x)
        if spec.collective == "alltoall":
            keep_own(spec, buffer, self.rank)
        if operation is not None:
            operation.run()
        else:
            self._now.run(plan or self._now.plan(spec), buffer, reduction)
        if result.numel():
            part = buffer[start : start + result.numel()]
            reduction.finish(part, self.size)
            load(result, part)


def places_of(spec: Spec, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where in the buffer a rank's contribution and its result lie."""
    bounds, collective = spec.bounds, spec.collective
    whole = (0, bounds[-1])
    if collective == "alltoall":
        half = bounds[(len(bounds) - 1) // 2]
        return (0, half), (half, bounds[-1])
    own = (bounds[rank], bounds[rank + 1]) if rank + 1 < len(bounds) else whole
    return (
        own if collective in ("allgather", "gather") else whole,
        own if collective in ("reduce_scatter", "scatter") else whole,
    )


def is_window(spec: Spec) -> bool:
    """Whether a spec is carried out in shared memory."""
    return isinstance(collectives.find(spec.collective, spec.algorithm), WindowAlgorithm)
