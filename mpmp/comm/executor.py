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
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpmp.comm.buffer import as_bytes, pieces
from mpmp.comm.world import World
from mpmp.errors import TensorError
from mpmp.programs import collectives
from mpmp.programs.steps import NONE, Reduce, Round, Send

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
"""How what arrives is combined with what is there; each takes (a, b, out=a)."""


@dataclass(frozen=True, slots=True)
class Message:
    """Elements [start, stop) of the buffer, to or from a peer."""

    start: int
    stop: int
    peer: int
    kind: str  # "send", "receive" (overwrites) or "reduce" (combines)
    scratch: int | None  # where it lands; None: straight in the buffer


@dataclass(frozen=True, slots=True)
class Plan:
    """A program lowered for one rank: the messages of each round, in elements."""

    title: str
    rounds: tuple[tuple[Message, ...], ...]
    bounds: tuple[int, ...]
    scratch_elements: int


@dataclass(frozen=True, slots=True)
class Spec:
    """What all ranks of a group must agree on; the key of a plan."""

    collective: str
    algorithm: str
    dtype: torch.dtype
    bounds: tuple[int, ...]
    """Element offsets of the chunks, from 0 to the length of the buffer."""
    op: str = "sum"
    root: int | None = None

    def __str__(self) -> str:
        root = "" if self.root is None else f" from {self.root}"
        sizes = [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.collective}/{self.algorithm}/{self.op}{root} of {dtype} chunks {sizes}"


def lower(spec: Spec, rank: int, size: int) -> Plan:
    """Follow a program for one rank and give its chunks their elements."""
    algorithm = collectives.find(spec.collective, spec.algorithm)
    facts = {} if spec.root is None else {"root": spec.root}
    rounds = [_lower_round(one, spec.bounds) for one in algorithm.program(rank, size, **facts)]
    scratch = max(
        (sum(m.stop - m.start for m in one if m.scratch is not None) for one in rounds), default=0
    )
    title = f"{spec.collective}/{spec.algorithm}"
    return Plan(title, tuple(rounds), spec.bounds, scratch)


def _lower_round(one: Round, bounds: tuple[int, ...]) -> tuple[Message, ...]:
    def span(chunk: int, count: int) -> tuple[int, int]:
        return bounds[chunk], bounds[chunk + count]

    messages: list[Message] = []
    for step in one.steps:
        if not isinstance(step, Send) or step.to == NONE:
            continue
        start, stop = span(step.chunk, step.count)
        if start < stop:
            messages.append(Message(start, stop, step.to, "send", None))
    sent = [(m.start, m.stop) for m in messages]
    used = 0
    for step in one.steps:
        if isinstance(step, Send) or step.source == NONE:
            continue
        start, stop = span(step.chunk, step.count)
        if start == stop:
            continue
        reduces = isinstance(step, Reduce)
        # A send of this round may still be reading the buffer: what overlaps it waits in scratch.
        aside = reduces or any(low < stop and start < high for low, high in sent)
        kind = "reduce" if reduces else "receive"
        messages.append(Message(start, stop, step.source, kind, used if aside else None))
        used += stop - start if aside else 0
    return tuple(messages)


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
            world.wait(requests, describe, background=background)
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
        for message in messages:
            memory, offset = self.buffer, 0
            if message.scratch is not None:
                memory, offset = self._scratch, message.scratch - message.start
            for start, stop in pieces(message.start, message.stop, memory.itemsize):
                part = as_bytes(memory[start + offset : stop + offset])
                requests.append((send if message.kind == "send" else receive)(part, message.peer))
        return requests

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
        self.world.wait([request], lambda: f"all ranks of group {self.name} to agree on {spec}")
        if (all_ == mine).all():
            return
        specs = self.comm.allgather(str(spec))
        said = "; ".join(f"rank {self.ranks[rank]}: {text}" for rank, text in enumerate(specs))
        raise TensorError(f"the ranks of group {self.name} disagree on what to do: {said}")
