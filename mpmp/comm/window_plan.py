"""Window programs lowered for one rank to elements, and long buffers cut to pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpmp.comm.buffer import wire_dtype
from mpmp.comm.lane import Lane
from mpmp.comm.reductions import Reduction
from mpmp.comm.spec import Spec
from mpmp.comm.window_call import AWAIT, COMBINE, COPY, LOAD, PUBLISH, Step, WindowCall
from mpmp.programs import collectives
from mpmp.programs.steps import NONE
from mpmp.programs.windows import ALL, Await, Combine, Load, Publish, WindowAlgorithm


def window_algorithm(spec: Spec) -> WindowAlgorithm:
    """The window program that a spec names."""
    found = collectives.find(spec.collective, spec.algorithm)
    assert isinstance(found, WindowAlgorithm)
    return found


def lower(
    spec: Spec, reduction: Reduction, name: str, bounds: tuple[int, ...], lane: Lane, rank: int
) -> WindowCall:
    """A window program for one rank, its chunks given their elements."""
    algorithm = collectives.find(spec.collective, name)
    assert isinstance(algorithm, WindowAlgorithm)
    facts = algorithm.taken({**dict(spec.facts), "pieces": len(bounds) - 1})
    steps: list[Step] = []
    for step in algorithm.program(rank, lane.size, **facts):
        if isinstance(step, Publish):
            steps.append((PUBLISH, 0, 0, 0, 0))
        elif isinstance(step, Load):
            first = bounds[step.chunk]
            steps.append((LOAD, 0, 0, first, bounds[step.chunk + 1] - first))
        elif isinstance(step, Await):
            steps.append((AWAIT, step.source, 0, 0, 0))
        elif step.store_to != NONE:
            steps.append(_combine(step, bounds))
    signature = _hash(spec, f"{name} in {bounds}")
    divide = float(lane.size) if reduction.averages else 1.0
    sums = reduction.combine is torch.add
    combine = None if sums else _chained(reduction, spec.dtype)
    call = WindowCall(lane, steps, spec.dtype, signature, divide, combine)
    if algorithm.slots == 2:
        call.use_slots()
    return call


def meeting(spec: Spec, lane: Lane) -> WindowCall:
    """A call in which the ranks compare a spec and do nothing else."""
    steps: list[Step] = [(PUBLISH, 0, 0, 0, 0), (AWAIT, ALL, 0, 0, 0)]
    call = WindowCall(lane, steps, torch.uint8, _hash(spec, "plan"), 1.0, None)
    call.place(0)
    return call


def _combine(step: Combine, bounds: tuple[int, ...]) -> Step:
    start, stop = bounds[step.chunk], bounds[step.chunk + step.count]
    kind = COMBINE if step.sum_from == ALL else COPY
    return kind, int(step.sum_from), int(step.store_to), start, stop - start


def _chained(
    reduction: Reduction, dtype: torch.dtype
) -> Callable[[list[Tensor], list[Tensor]], None]:
    """A reduction that is no sum, from rank to rank; 16-bit floats are rounded once."""
    wire = wire_dtype(dtype, reduces=True)

    def combine(sources: list[Tensor], targets: list[Tensor]) -> None:
        total = sources[0].to(wire, copy=True)
        for one in sources[1:]:
            reduction.combine(total, one.to(wire), out=total)
        for target in targets:
            target.copy_(total)

    return combine


def pieces(spec: Spec, lane: Lane) -> tuple[int, ...]:
    """Bounds of the pieces in which a buffer passes through the slots of a lane."""
    most, total = max(1, lane.slot_bytes // spec.dtype.itemsize), spec.bounds[-1]
    return (0, *range(most, total, most), total)


def cut(bounds: Sequence[int], most: int) -> list[list[tuple[int, int]]]:
    """For each piece, the span of each chunk that belongs to it; at most ``most`` elements."""
    step = most // (len(bounds) - 1)
    chunks = list(zip(bounds, bounds[1:], strict=False))
    longest = max(high - low for low, high in chunks)
    return [
        [(min(low + at, high), min(low + at + step, high)) for low, high in chunks]
        for at in range(0, max(longest, 1), step)
    ]


def copy_spans(
    spans: list[tuple[int, int]],
    bounds: list[int],
    tensor: Tensor,
    offset: int,
    copy: Callable[[Tensor, Tensor], object],
    buffer: Tensor,
) -> None:
    """Copy what ``tensor`` (elements from ``offset`` on) and the piece in ``buffer`` share."""
    for (low, high), place in zip(spans, bounds, strict=False):
        first, last = max(low, offset), min(high, offset + tensor.numel())
        if first < last:
            there = buffer[place + first - low : place + last - low]
            copy(tensor[first - offset : last - offset], there)


def _hash(spec: Spec, detail: str) -> int:
    return int.from_bytes(hashlib.sha256(spec.digest + detail.encode()).digest()[:8], "little")
