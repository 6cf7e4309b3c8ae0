"""The bridge: an allreduce over hosts of several ranks each, as collectives of smaller groups.

      host 0    host 1     1. a reduce-scatter in the windows of each host,
      0 - 1     2 - 3      2. an allreduce by messages between the ranks with the same place,
      |   |     |   |         each on its 1/m of the vector,
      +---|-----+   |      3. an allgather in the windows of each host.
          +---------+
What the program ``hierarchical`` says in messages alone; here only what leaves a host is one.

Not taken by 16-bit floats, whose partial sums must leave a host in float32 and a window's sums do
not, by functions of the user's and by GPU tensors: these keep the program.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from mpmp.comm.buffer import load
from mpmp.comm.executor import Executor
from mpmp.comm.mpi import MPI
from mpmp.comm.progress import Handle
from mpmp.comm.reductions import Reduction
from mpmp.comm.spec import Spec
from mpmp.comm.started import Prepared, Replay
from mpmp.errors import TensorError
from mpmp.programs.collectives.hosts import Hosts
from mpmp.programs.partition import partition

if TYPE_CHECKING:
    from mpmp.comm.group import Group

WINDOW = "window"


class Bridge:
    """The two smaller groups of each rank: its host's, and that of its place on all hosts.

    ``split(color, name)`` makes the group of those who give the same color; all ranks together.
    """

    def __init__(
        self, now: Executor, hosts: tuple[int, ...], split: Callable[[int, str], Group]
    ) -> None:
        self.now, self._split = now, split
        self._at = Hosts(now.comm.rank, now.comm.size, hosts)
        self._groups: tuple[Group, Group] | None = None
        self._asked = False

    @classmethod
    def over(
        cls, now: Executor, hosts: tuple[int, ...], split: Callable[[int, str], Group]
    ) -> Bridge | None:
        """A bridge where there are several hosts with the same number of ranks, more than one."""
        there = Hosts(0, len(hosts), hosts)
        leads_somewhere = there.are_even and there.number > 1 and there.most > 1
        return cls(now, hosts, split) if leads_somewhere else None

    def takes(self, spec: Spec, reduction: Reduction, x: Tensor) -> bool:
        """Whether a call crosses; all ranks have agreed on it then, and the bridge is open."""
        if (spec.collective, spec.algorithm) != ("allreduce", "hierarchical"):
            return False
        if spec.given is not None or reduction.own or x.is_cuda:
            return False
        self.now.plan(spec)
        if not self._asked:
            self._asked, self._groups = True, self._open()
        return self._groups is not None

    def carry_out(self, reduction: Reduction, x: Tensor, result: Tensor) -> None:
        """The allreduce of ``x`` into ``result``, which may be the same memory."""
        inside, between = self.groups
        lengths, first, end = self.place(x.numel())
        piece, op = result[first:end], inner(reduction)
        inside.reduce_scatter(x, op, WINDOW, out=piece)
        between.allreduce(piece, op, out=piece)
        reduction.finish(piece, self.now.comm.size)
        inside.allgather(piece, lengths, WINDOW, out=result)

    @property
    def groups(self) -> tuple[Group, Group]:
        assert self._groups is not None, "a bridge carries what it takes"
        return self._groups

    def place(self, total: int) -> tuple[list[int], int, int]:
        """Elements of the pieces of a host's ranks; where this rank's begins and ends."""
        cuts = partition(total, self._at.most)
        return [stop - start for start, stop in cuts], *cuts[self._at.place]

    def free(self) -> None:
        """Give the communicators back; all ranks of the group together."""
        for group in self._groups or ():
            group.free()
        self._groups = None

    def _open(self) -> tuple[Group, Group] | None:
        """The groups, or None on all ranks where those of some host share no memory."""
        found = self._split(self._at.host, "on a host"), self._split(self._at.place, "across hosts")
        windows = found[0].windows
        shares = windows is not None and windows.ready()
        if self.now.comm.allreduce(int(shares), MPI.MIN):
            return found
        for group in found:
            group.free()
        return None


class Bridged:
    """A prepared allreduce: ``run`` crosses the bridge, ``start`` sends messages alone.

    Whoever starts must not wait, and the second collective waits for the first. What crosses is
    prepared at the first run, by all ranks together: many are only ever started.
    """

    def __init__(self, bridge: Bridge, program: Prepared, reduction: Reduction, x: Tensor) -> None:
        self._bridge, self._program, self.spec = bridge, program, program.spec
        self._reduction, self._x = reduction, x
        self._buffer = self._piece = x
        self._parts: tuple[Replay, Replay, Replay] | None = None
        self._freed = False

    def run(self) -> None:
        """Carry it out on what is in the memory now."""
        began, now = time.perf_counter(), self._bridge.now
        scatter, between, gather = self.parts
        load(self._buffer, self._x)
        scatter.run()
        between.run()
        self._reduction.finish(self._piece, now.comm.size)
        gather.run()
        load(self._x, self._buffer)
        now.spent_s += time.perf_counter() - began

    def start(self) -> Handle:
        """Start the program; wait for the handle before reading the memory."""
        return self._program.start()

    def free(self) -> None:
        """Let all that was prepared go; nothing of it may be under way."""
        for one in (*(self._parts or ()), self._program):
            one.free()
        self._parts, self._freed = None, True

    @property
    def parts(self) -> tuple[Replay, Replay, Replay]:
        """The three collectives, on a buffer in the share where there is room."""
        if self._freed:
            raise TensorError(f"{self.spec} was freed; prepare it anew")
        if self._parts is None:
            inside, between = self._bridge.groups
            lengths, first, end = self._bridge.place(self._x.numel())
            windows = inside.windows
            if windows is None or windows.shares.offset(self._x) < 0:
                self._buffer = inside.empty((self._x.numel(),), self._x.dtype)
            whole, piece, op = self._buffer, self._buffer[first:end], inner(self._reduction)
            self._piece = piece
            self._parts = (
                inside.prepare("reduce_scatter", whole, op=op, lengths=lengths, algorithm=WINDOW),
                between.prepare("allreduce", piece, op=op),
                inside.prepare("allgather", whole, lengths=lengths, algorithm=WINDOW),
            )
        return self._parts


def inner(reduction: Reduction) -> str:
    """What the smaller groups do: an average is divided once, by the number of all ranks."""
    return "sum" if reduction.averages else reduction.name
