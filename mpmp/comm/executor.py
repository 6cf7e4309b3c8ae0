"""The executor: a program is lowered for one rank, bound to memory, and replayed.

    program  --lower-->  Plan (element ranges, no memory)  --bind-->  Operation (requests)  --run-->

A plan is agreed on by all ranks of the group once, when it is made: ranks whose counts, dtypes,
algorithms or roots differ would hang or add garbage. An operation on memory that stays (a bucket, a
staging slot) holds prepared requests; on passing tensors it posts plain ones.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpmp.comm.buffer import as_bytes, pieces
from mpmp.comm.mpi import MPI
from mpmp.comm.plan import Message, Plan, Spec, lower
from mpmp.comm.world import World
from mpmp.errors import TensorError

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
"""How what arrives is combined with what is there; each takes (a, b, out=a)."""


PROGRAM_TAG = 32767
"""Tag of all messages of programs, the highest that every MPI has; Transfer keeps below it."""


class Operation:
    """A plan bound to one buffer; ``run`` may be called again and again."""

    def __init__(
        self, plan: Plan, buffer: Tensor, combine: str, executor: Executor, *, prepared: bool
    ) -> None:
        self.plan, self.buffer, self.executor = plan, buffer, executor
        self._combine = OPERATIONS[combine]
        # Prepared requests keep pointing at their scratch; passing operations share one.
        if prepared:
            self._scratch = buffer.new_empty(plan.scratch_elements)
        else:
            self._scratch = executor.scratch(plan.scratch_elements, buffer)
        self._prepared = (
            [self._post(one, prepare=True) for one in plan.rounds] if prepared else None
        )
        self._statuses = [MPI.Status() for _ in range(self._most_requests())]

    def run(self, *, background: bool = False) -> None:
        """Carry the rounds out."""
        world = self.executor.world
        self._settle()
        for number, messages in enumerate(self.plan.rounds):
            if world.trace:
                self._trace(number, messages)
            if self._prepared is None:
                requests = self._post(messages, prepare=False)
            else:
                requests = self._prepared[number]
                MPI.Prequest.Startall(requests)
            describe = partial(self._describe, number, messages)
            statuses = self._statuses[: len(requests)]
            peers = [(self.executor.ranks[m.peer],) for m, _, _ in self._parts(messages)]
            world.wait(requests, describe, peers=peers, statuses=statuses, background=background)
            self._refuse_short(messages, statuses, describe)
            for message in messages:
                if message.scratch is not None:
                    self._put(message)
            self._settle()

    def free(self) -> None:
        """Give the prepared requests back to MPI."""
        for requests in self._prepared or []:
            for request in requests:
                request.Free()
        self._prepared = []

    def _post(self, messages: tuple[Message, ...], *, prepare: bool) -> list[Any]:
        comm, requests = self.executor.comm, []
        send, receive = (comm.Send_init, comm.Recv_init) if prepare else (comm.Isend, comm.Irecv)
        for message, start, stop in self._parts(messages):
            memory, offset = self.buffer, 0
            if message.scratch is not None:
                memory, offset = self._scratch, message.scratch - message.start
            part = as_bytes(memory[start + offset : stop + offset])
            post = send if message.kind == "send" else receive
            requests.append(post(part, message.peer, PROGRAM_TAG))
        return requests

    def _most_requests(self) -> int:
        return max((sum(1 for _ in self._parts(one)) for one in self.plan.rounds), default=0)

    def _parts(self, messages: tuple[Message, ...]) -> Iterator[tuple[Message, int, int]]:
        """The messages of a round, long ones in pieces: element ranges of the buffer."""
        for message in messages:
            for start, stop in pieces(message.start, message.stop, self.buffer.itemsize):
                yield message, start, stop

    def _refuse_short(
        self,
        messages: tuple[Message, ...],
        statuses: list[MPI.Status],
        describe: Callable[[], str],
    ) -> None:
        """MPI takes a message that is too short without a word, and leaves old bytes behind it."""
        for (message, start, stop), status in zip(self._parts(messages), statuses, strict=True):
            wanted = (stop - start) * self.buffer.itemsize
            if message.kind != "send" and status.count != wanted:
                raise TensorError(
                    f"{describe()} sent {status.count} B where this rank expects {wanted} B; all "
                    "ranks must make the same calls with the same shapes"
                )

    def _put(self, message: Message) -> None:
        target = self.buffer[message.start : message.stop]
        assert message.scratch is not None
        arrived = self._scratch[message.scratch : message.scratch + message.stop - message.start]
        if message.kind == "reduce":
            self._combine(target, arrived, out=target)
        else:
            target.copy_(arrived)

    def _settle(self) -> None:
        # MPI knows no streams: what is sent next must have been computed.
        if self.buffer.is_cuda:
            torch.cuda.current_stream(self.buffer.device).synchronize()

    def _describe(self, number: int, messages: tuple[Message, ...]) -> str:
        peers = sorted({self.executor.ranks[m.peer] for m in messages})
        return (
            f"rank{'s' * (len(peers) > 1)} {', '.join(map(str, peers))} in {self.plan.title} "
            f"(round {number}) on group {self.executor.name}"
        )

    def _trace(self, number: int, messages: tuple[Message, ...]) -> None:
        for message in messages:
            towards = "to" if message.kind == "send" else "from"
            nbytes = (message.stop - message.start) * self.buffer.itemsize
            self.executor.trace(
                f"{self.plan.title} round {number}: {message.kind} {nbytes} B {towards} "
                f"{self.executor.ranks[message.peer]}"
            )


class Executor:
    """Plans and operations of one group on one communicator of its own."""

    MOST_PLANS, MOST_SLOTS = 256, 64

    def __init__(
        self, world: World, comm: MPI.Intracomm, ranks: tuple[int, ...], name: str
    ) -> None:
        self.world, self.comm, self.ranks, self.name = world, comm, ranks, name
        self.spent_s = 0.0
        """Seconds this rank has spent in what it waited for at once."""
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._slots: OrderedDict[Hashable, Operation] = OrderedDict()
        self._bound: list[Operation] = []
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def plan(self, spec: Spec) -> Plan:
        """The plan of a spec, made and agreed on at first use, kept while it is in use."""
        if spec in self._plans:
            self._plans.move_to_end(spec)
            return self._plans[spec]
        self._agree(spec)
        plan = self._plans[spec] = lower(spec, self.comm.rank, self.comm.size)
        if len(self._plans) > self.MOST_PLANS:
            self._plans.popitem(last=False)
        return plan

    def slot(self, spec: Spec, pinned: bool) -> Operation:
        """A staging buffer of the spec's length with prepared requests."""
        key = (spec, pinned)
        if key in self._slots:
            self._slots.move_to_end(key)
            return self._slots[key]
        buffer = torch.empty(spec.bounds[-1], dtype=spec.dtype, pin_memory=pinned)
        slot = Operation(self.plan(spec), buffer, spec.op, self, prepared=True)
        self._slots[key] = slot
        if len(self._slots) > self.MOST_SLOTS:
            self._slots.popitem(last=False)[1].free()
        return slot

    def bind(self, spec: Spec, buffer: Tensor, *, prepared: bool) -> Operation:
        """An operation on the caller's buffer (one dim, ``spec.bounds[-1]`` elements)."""
        operation = Operation(self.plan(spec), buffer, spec.op, self, prepared=prepared)
        if prepared:
            self._bound.append(operation)
        return operation

    def scratch(self, length: int, like: Tensor) -> Tensor:
        """Memory for what arrives, as long as no other operation of this executor runs."""
        key = like.dtype, like.device
        if key not in self._scratch or self._scratch[key].numel() < length:
            self._scratch[key] = like.new_empty(length)
        return self._scratch[key]

    def free(self) -> None:
        """Give requests and communicator back to MPI; all ranks of the group together."""
        for operation in [*self._slots.values(), *self._bound]:
            operation.free()
        self._slots.clear()
        self._bound.clear()
        if self.comm not in (MPI.COMM_SELF, MPI.COMM_NULL):
            self.comm.Free()

    def trace(self, line: str) -> None:
        at = time.perf_counter() - self.world.born_s
        sys.stderr.write(f"[{self.world.name}] {at:.6f} s {self.name}: {line}\n")

    def _agree(self, spec: Spec) -> None:
        """Raise TensorError on every rank where the ranks bring different specs."""
        if self.comm.size == 1:
            return
        mine = np.frombuffer(hashlib.sha256(str(spec).encode()).digest(), dtype=np.uint8)
        all_ = np.empty((self.comm.size, mine.size), dtype=np.uint8)
        request = self.comm.Iallgather(mine, all_)
        said = f"all ranks of group {self.name} to agree on {spec}"
        self.world.wait([request], lambda: said, peers=[self.ranks])
        if (all_ == mine).all():
            return
        specs = self.world.gather_texts(str(spec), self.comm)
        said = "; ".join(f"rank {self.ranks[rank]}: {text}" for rank, text in enumerate(specs))
        raise TensorError(f"the ranks of group {self.name} disagree on what to do: {said}")
