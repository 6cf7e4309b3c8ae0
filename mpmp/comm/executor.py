"""The executor: a program is lowered for one rank, bound to memory, and replayed.

    program  --lower-->  Plan (element ranges, no memory)  --bind-->  Operation (requests)  --run-->

A plan is agreed on by all ranks of the group once, when it is made: ranks whose counts, dtypes,
algorithms or roots differ would hang or add garbage. Plans and staging slots are kept while they
are in use, operations on memory that stays until their owner lets them go.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from mpmp.comm.mpi import MPI
from mpmp.comm.operation import PROGRAM_TAG, Operation
from mpmp.comm.plan import Plan, lower
from mpmp.comm.reductions import Reduction
from mpmp.comm.spec import Spec
from mpmp.comm.world import World
from mpmp.errors import PeerError, TensorError

__all__ = ["PROGRAM_TAG", "Executor"]


class Executor:
    """Plans and operations of one group on one communicator of its own.

    Its operations run one after another, or, in ``lanes``, that many side by side.
    """

    MOST_PLANS, MOST_SLOTS = 256, 64

    def __init__(
        self,
        world: World,
        comm: MPI.Intracomm,
        ranks: tuple[int, ...],
        name: str,
        lanes: int = 1,
    ) -> None:
        self.world, self.comm, self.ranks, self.name = world, comm, ranks, name
        self._lanes, self._num_bound = lanes, 0
        self.spent_s = 0.0
        """Seconds this rank has spent in what it waited for at once."""
        self.broken: list[Operation] = []
        """Operations that failed half-way; their requests may still write to their memory, and the
        next messages would be taken for theirs."""
        self.freed = False
        self.agree_with: Callable[[Spec], None] = self._agree_by_messages
        """Raises TensorError on all ranks where they bring different specs."""
        self._plans: OrderedDict[Spec, Plan] = OrderedDict()
        self._slots: OrderedDict[Hashable, Operation] = OrderedDict()
        self._bound: set[Operation] = set()
        self._let_go: deque[Operation] = deque()
        self._scratch: dict[Hashable, Tensor] = {}

    def plan(self, spec: Spec) -> Plan:
        """The plan of a spec, made and agreed on at first use, kept while it is in use."""
        if spec in self._plans:
            self._plans.move_to_end(spec)
            return self._plans[spec]
        self.require_whole()
        self.agree_with(spec)
        plan = self._plans[spec] = self.lower(spec)
        if len(self._plans) > self.MOST_PLANS:
            self._plans.popitem(last=False)
        return plan

    def lower(self, spec: Spec) -> Plan:
        """A plan that is not kept, nor compared: its counts have been exchanged already."""
        return lower(spec, self.comm.rank, self.comm.size)

    def slot(self, spec: Spec, reduction: Reduction, pinned: bool) -> Operation:
        """A staging buffer of the spec's length with prepared requests."""
        key = spec, reduction, pinned
        if key in self._slots:
            self._slots.move_to_end(key)
            return self._slots[key]
        buffer = torch.empty(spec.bounds[-1], dtype=spec.dtype, pin_memory=pinned)
        slot = Operation(self.plan(spec), buffer, reduction, self)
        self._slots[key] = slot
        if len(self._slots) > self.MOST_SLOTS:
            self._slots.popitem(last=False)[1].free()
        return slot

    def bind(self, plan: Plan, buffer: Tensor, reduction: Reduction) -> Operation:
        """A plan on the caller's buffer (one dim, ``plan.length`` elements), until it is let go.

        Lanes are taken in turns; all ranks bind in the same order, so theirs are the same.
        """
        while self._let_go:
            operation = self._let_go.popleft()
            self._bound.discard(operation)
            operation.free()
        self.require_whole()
        operation = Operation(plan, buffer, reduction, self, self._num_bound % self._lanes)
        self._num_bound += 1
        self._bound.add(operation)
        return operation

    def let_go(self, operation: Operation) -> None:
        """Free an operation that is not under way, at the next bind.

        Only noted here: a finaliser may call this anywhere, on any thread, inside MPI too.
        """
        self._let_go.append(operation)

    def run(self, plan: Plan, buffer: Tensor, reduction: Reduction) -> None:
        """Run a plan once, on memory that does not stay."""
        operation = Operation(plan, buffer, reduction, self)
        operation.run()
        operation.free()

    def require_whole(self) -> None:
        """Refuse what could not be carried out any more."""
        if self.freed:
            raise TensorError(f"the mesh of group {self.name} was freed; make another one")
        if self.broken:
            raise PeerError(
                f"group {self.name} gave up in the middle of {self.broken[0].plan.title}; its "
                "ranks cannot exchange messages again"
            )

    def scratch(self, length: int, like: Tensor, lane: int) -> Tensor:
        """Memory for what arrives in a lane; what was given before stays valid."""
        key = like.dtype, like.device, lane
        if key not in self._scratch or self._scratch[key].numel() < length:
            self._scratch[key] = like.new_empty(length)
        return self._scratch[key]

    def free(self) -> None:
        """Give requests and communicator back to MPI; all ranks of the group together."""
        for operation in {*self._slots.values(), *self._bound} - {*self.broken}:
            operation.free()
        self._slots.clear()
        self._bound.clear()
        self._let_go.clear()
        self.freed = True
        if self.comm not in (MPI.COMM_SELF, MPI.COMM_NULL):
            self.comm.Free()

    def trace(self, line: str) -> None:
        at = time.perf_counter() - self.world.born_s
        sys.stderr.write(f"[{self.world.name}] {at:.6f} s {self.name}: {line}\n")

    def _agree_by_messages(self, spec: Spec) -> None:
        if self.comm.size == 1:
            return
        mine = np.frombuffer(spec.digest, dtype=np.uint8)
        all_ = np.empty((self.comm.size, mine.size), dtype=np.uint8)
        request = self.comm.Iallgather(mine, all_)
        said = f"all ranks of group {self.name} to agree on {spec}"
        self.world.wait([request], lambda: said, peers=[self.ranks])
        if not (all_ == mine).all():
            refuse(self.world, self.comm, self.ranks, self.name, spec)


def refuse(
    world: World, comm: MPI.Intracomm, ranks: Sequence[int], name: str, spec: Spec
) -> NoReturn:
    """Raise TensorError with what every rank is about to do; all ranks of the group together."""
    specs = world.gather_texts(str(spec), comm)
    said = "; ".join(f"rank {ranks[rank]}: {text}" for rank, text in enumerate(specs))
    raise TensorError(f"the ranks of group {name} disagree on what to do: {said}")
