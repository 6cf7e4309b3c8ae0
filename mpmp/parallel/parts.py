"""Which layers each stage holds: evenly, by hand, or by what they were measured to cost.

    embedding | layer layer layer | layer layer layer | layer layer head
                    one row of costs, cut so that the dearest stage is as cheap as possible

In the measured cut embedding and head weigh as layers do, so that the ends get fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median

import torch

from mpmp.comm.mesh import Mesh
from mpmp.errors import LayoutError
from mpmp.parallel.recorder import now
from mpmp.parallel.stage import Microbatch, Part, Stage
from mpmp.programs.partition import balanced, partition
from mpmp.programs.steps import Schedule

_REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """Seconds that forward and backward of one microbatch take."""

    embedding: float
    layer: float
    head: float


def parts(
    schedule: Schedule,
    rank: int,
    ranks: int,
    layers: int,
    cut: str = "even",
    costs: Costs | None = None,
) -> list[Part]:
    """What the chunks of one of ``ranks`` pipeline ranks hold, in their order.

    ``cut`` is "even", "measured" (by ``costs``) or numbers of layers as in "3,3,2", one a stage.
    Raises LayoutError where the layers cannot be cut so.
    """
    stages = schedule.chunks * ranks
    ranges = _ranges(schedule, ranks, layers, cut, costs)
    ends = tuple(schedule.place_of(stage, ranks)[0] for stage in (0, stages - 1))
    numbers = [schedule.stage_of(rank, chunk, ranks) for chunk in range(schedule.chunks)]
    shared = ends if ends[0] != ends[1] else ()
    return [Part(number, stages, ranges[number], shared) for number in numbers]


def measure_costs(
    build: Callable[[Part], Stage],
    microbatch: Microbatch,
    mesh: Mesh,
    context: Callable[[], AbstractContextManager[object]],
) -> Costs:
    """Times embedding, one layer and head, each as a stage of its own that ``build`` makes.

    All ranks measure together, for layers that are cut over ranks need them; rank 0's times count.
    """
    own = torch.tensor(
        [
            _seconds(build(Part(number, 3, layers)), number, microbatch, context)
            for number, layers in enumerate(((0, 0), (0, 1), (1, 1)))
        ],
        dtype=torch.float64,
    )
    return Costs(*mesh.everyone.broadcast(own).tolist())


def _ranges(
    schedule: Schedule, ranks: int, layers: int, cut: str, costs: Costs | None
) -> list[tuple[int, int]]:
    """(start, stop) of the layers of every stage."""
    stages = schedule.chunks * ranks
    if stages > layers:
        each = f", {schedule.chunks} each" if schedule.chunks > 1 else ""
        raise LayoutError(
            f"schedule {schedule.name} on {ranks} ranks{each} has {stages} stages, more than the "
            f"model's {layers} layers; use at least {stages} layers or fewer pipeline ranks"
        )
    if cut == "even":
        return partition(layers, stages)
    if cut == "measured":
        assert costs is not None, "a measured cut needs costs"
        return _measured(layers, stages, costs)
    numbers = [int(one) for one in cut.split(",")]
    if len(numbers) != stages or sum(numbers) != layers or 0 in numbers[1:-1]:
        raise LayoutError(
            f"parallel.cut {cut} gives {sum(numbers)} layers to {len(numbers)} stages; it must "
            f"share the model's {layers} layers out to {stages} stages, of which only the first "
            f"and the last may go without, as in {_by_hand(partition(layers, stages))}"
        )
    return list(pairwise(accumulate(numbers, initial=0)))


def _measured(layers: int, stages: int, costs: Costs) -> list[tuple[int, int]]:
    row = [costs.embedding, *[costs.layer] * layers, costs.head]
    # Places in the row are one more than those of layers; embedding and head are none.
    return [(max(start - 1, 0), min(stop - 1, layers)) for start, stop in balanced(row, stages)]


def _by_hand(ranges: Sequence[tuple[int, int]]) -> str:
    return ",".join(str(stop - start) for start, stop in ranges)


def _seconds(
    stage: Stage,
    number: int,
    microbatch: Microbatch,
    context: Callable[[], AbstractContextManager[object]],
) -> float:
    """Of forward and backward, the median after one that warms up; 0 of an empty stage."""
    device = microbatch.inputs_Bt.device
    shape = stage.hidden_shape(microbatch)
    hidden = torch.ones(shape, dtype=stage.dtype, device=device, requires_grad=True)
    times = []
    for _ in range(1 + _REPEATS):
        start = now(device)
        with context():
            y, extra = stage(hidden if number else microbatch.inputs_Bt, microbatch)
            if number == 2:
                y = stage.losses(y, microbatch).sum()
        roots = [y] if extra is None else [y, extra]
        torch.autograd.backward(roots, [torch.ones_like(one) for one in roots])
        times.append(now(device) - start)
    return median(times[1:])
