"""Window programs lowered for one rank to elements, and long buffers cut to pieces."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpmp.comm.buffer import wire_dtype
from mpmp.comm.lane import CACHE_LINE_BYTES, Lane
from mpmp.comm.reductions import Reduction
from mpmp.comm.spec import Spec
from mpmp.comm.window_call import AWAIT, COMBINE, COPY, LOAD, PUBLISH, Step, WindowCall
from mpmp.programs import collectives
from mpmp.programs.choose import through_slots
from mpmp.programs.partition import partition
from mpmp.programs.steps import NONE
from mpmp.programs.windows import ALL, Await, Combine, Load, Publish, WindowAlgorithm


def window_algorithm(spec: Spec) -> WindowAlgorithm:
    """The window program that a spec names."""
    found = collectives.find(spec.collective, spec.algorithm)
    assert isinstance(found, WindowAlgorithm)
    return found


def program_in_slots(spec: Spec, size: int) -> str | None:
    """The program that takes a buffer through slots as a whole, where the others cannot reach it.

    None where it is copied into a slot, piece by piece, and combined there as in a window.
    """
    if window_algorithm(spec).slots:
        return spec.algorithm
    return through_slots(size, spec.nbytes) if spec.collective == "allreduce" else None


def lower(
    spec: Spec, reduction: Reduction, name: str, bounds: tuple[int, ...], lane: Lane, rank: int
) -> WindowCall:
    """A window program for one rank, its chunks given their elements."""
    algorithm = collectives.find(spec.collective, name)
    assert isinstance(algorithm, WindowAlgorithm)
    in_slots, piece = algorithm.slots > 0, algorithm.chunks_of_piece(lane.size)
    facts = algorithm.taken({**dict(spec.facts), "pieces": (len(bounds) - 1) // piece})
    room = _room(bounds, spec.dtype.itemsize)
    steps: list[Step] = []
    for step in algorithm.program(rank, lane.size, **facts):
        if isinstance(step, Publish):
            steps.append((PUBLISH, 0, 0, 0, 0, 0))
        elif isinstance(step, Await):
            steps.append((AWAIT, step.source, 0, 0, 0, 0))
        elif isinstance(step, Load) or step.store_to != NONE:
            start, stop = bounds[step.chunk], bounds[step.chunk + step.count]
            place = step.chunk % piece * room if in_slots else start
            steps.append((*_words(step), start, place, stop - start))
    signature = _hash(spec, f"{name} in {bounds}")
    divide = float(lane.size) if reduction.averages else 1.0
    sums = reduction.combine is torch.add
    combine = None if sums else _chained(reduction, spec.dtype)
    call = WindowCall(lane, steps, spec.dtype, signature, divide, combine)
    if in_slots:
        call.use_slots()
    return call


def meeting(spec: Spec, lane: Lane) -> WindowCall:
    """A call in which the ranks compare a spec and do nothing else."""
    steps: list[Step] = [(PUBLISH, 0, 0, 0, 0, 0), (AWAIT, ALL, 0, 0, 0, 0)]
    return WindowCall(lane, steps, torch.uint8, _hash(spec, "plan"), 1.0, None)


def _words(step: Load | Combine) -> tuple[int, int, int]:
    """Kind, source and target of a step."""
    if isinstance(step, Load):
        return LOAD, 0, 0
    kind = COMBINE if step.sum_from == ALL else COPY
    return kind, int(step.sum_from), int(step.store_to)


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


def pieces(spec: Spec, name: str, lane: Lane) -> tuple[int, ...]:
    """Bounds of the chunks of all pieces in which a buffer passes through the slots of a lane.

    Chunks begin on cache lines of a slot: no line is filled by two steps.
    """
    algorithm = collectives.find(spec.collective, name)
    assert isinstance(algorithm, WindowAlgorithm)
    line, total = CACHE_LINE_BYTES // spec.dtype.itemsize, spec.bounds[-1]
    num_chunks = algorithm.chunks_of_piece(lane.size)
    most = lane.slot_bytes // CACHE_LINE_BYTES // num_chunks * line * num_chunks
    found = [0]
    for begin in range(0, max(total, 1), most):
        length = min(most, total - begin)
        for _, stop in partition(-(-length // line), num_chunks):
            found.append(begin + min(stop * line, length))
    return tuple(found)


def _room(bounds: tuple[int, ...], itemsize: int) -> int:
    """Elements that each chunk has room for in a slot: the longest's, in whole cache lines.

    The same for all pieces: where one is shorter, sums of the last still lie beside its chunks.
    """
    line = CACHE_LINE_BYTES // itemsize
    longest = max(high - low for low, high in itertools.pairwise(bounds))
    return -(-longest // line) * line


def slot_bytes(spec: Spec, size: int) -> int:
    """Bytes of a slot that takes all of a buffer in one piece, nothing at all, too."""
    chunks = CACHE_LINE_BYTES * size
    return -(-max(spec.nbytes, 1) // chunks) * chunks


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
