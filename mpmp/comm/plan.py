"""Plans: a program lowered for one rank, its chunks given their elements, still without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpmp.programs import collectives
from mpmp.programs.steps import NONE, Reduce, Round, Send


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
