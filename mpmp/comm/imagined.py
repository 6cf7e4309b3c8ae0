"""A mesh of ranks that were never started: what each would hold, keep and send, in one process.

    for mesh in imagined("dp2.tp2.zero3"):      four meshes, one as each rank would see its own
        with torch.device("meta"):              shapes without memory
            models.build(..., mesh, ...)        what that rank would build

Its groups know ranks and sizes, carry nothing, give tensors of the right shape, and count what each
call would have this rank send. Numbers are never right: use them with tensors without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from mpmp.comm.group import Group
from mpmp.comm.mesh import SUMS, Mesh, fit, index_of
from mpmp.comm.world import World
from mpmp.config import AXES, parse_layout
from mpmp.errors import LayoutError
from mpmp.programs.partition import partition


@dataclass(frozen=True, eq=False)
class _World:
    rank: int
    size: int
    device: torch.device

    def gather_texts(self, text: str) -> list[str]:
        """All ranks say the same."""
        return [text] * self.size


class Imagined:
    """A group that carries nothing; ``axes`` are those of the mesh along which its ranks differ.

    ``sent_bytes`` counts what this rank would have to send at least: (p-1)/p of a tensor to scatter
    or gather it, and to exchange it when all have as much for each; twice that to sum it. All ranks
    are on one host.
    """

    overlaps = False

    def __init__(self, rank: int, size: int, axes: tuple[str, ...]) -> None:
        self.rank, self.size, self.axes = rank, size, axes
        self.hosts = (0,) * size
        self.sent_bytes = 0.0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def allreduce(self, x: Tensor, *_: Any, out: Tensor | None = None, **__: Any) -> Tensor:
        self._count(2, x.nbytes)
        return torch.empty_like(x) if out is None else out

    def reduce_scatter(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        self._count(1, x.nbytes)
        start, stop = partition(len(x), self.size)[self.rank]
        return x.new_empty((stop - start, *x.shape[1:]))

    def allgather(self, x: Tensor, lengths: Sequence[int] | None = None, **_: Any) -> Tensor:
        rows = len(x) * self.size if lengths is None else sum(lengths)
        found = x.new_empty((rows, *x.shape[1:]))
        self._count(1, found.nbytes)
        return found

    def alltoall(
        self,
        x: Tensor,
        send_lengths: Sequence[int] | None = None,
        *,
        take_lengths: Sequence[int] | None = None,
        **_: Any,
    ) -> Tensor:
        """Where nobody knows what comes, as many rows come as go."""
        even = [len(x) // self.size] * self.size
        own = (send_lengths or even)[self.rank]
        self.sent_bytes += x.nbytes / max(1, len(x)) * (len(x) - own)
        return x.new_empty((sum(take_lengths or even), *x.shape[1:]))

    def broadcast(self, x: Tensor, *_: Any, out: Tensor | None = None, **__: Any) -> Tensor:
        self._count(1, x.nbytes)
        return torch.empty_like(x) if out is None else out

    def send(self, x: Tensor, to: int, tag: int) -> _Nothing:
        self.sent_bytes += x.nbytes
        return _Nothing()

    def receive(self, x: Tensor, source: int, tag: int) -> _Nothing:
        return _Nothing()

    def numbers(self, own: Sequence[int]) -> list[list[int]]:
        """All ranks have the same."""
        return [list(own)] * self.size

    def barrier(self) -> None:
        pass

    def prepare(self, collective: str, memory: Tensor) -> _Prepared:
        return _Prepared(self, 2 if collective == "allreduce" else 1, memory.nbytes)

    def _count(self, passes: int, nbytes: int) -> None:
        self.sent_bytes += passes * nbytes * (self.size - 1) / self.size


class _Nothing:
    """What was never under way."""

    def wait(self) -> float:
        return 0.0

    def done(self) -> bool:
        return True


class _Prepared:
    """A prepared collective, which is counted each time."""

    def __init__(self, group: Imagined, passes: int, nbytes: int) -> None:
        self._group, self._passes, self._nbytes = group, passes, nbytes

    def start(self) -> _Nothing:
        self._group._count(self._passes, self._nbytes)
        return _Nothing()

    def run(self) -> None:
        self.start()


def groups_of(mesh: Mesh) -> list[Imagined]:
    """The groups of an imagined mesh, each once."""
    named = [mesh.data, mesh.expert, mesh.pipeline, mesh.context, mesh.tensor, mesh.model]
    found = [*named, mesh.everyone, *mesh.sums.values(), *mesh.ends.values()]
    return [cast(Imagined, one) for one in dict.fromkeys(found)]


def imagined(layout: str, device: str = "meta") -> Iterator[Mesh]:
    """The mesh of a layout as each of its ranks would see it, rank 0 first."""
    axes = parse_layout(layout)
    zero, sequence = axes.pop("zero"), axes.pop("sequence")
    axes.setdefault("data", axes["expert"])
    ranks = axes["data"] * axes["pipeline"] * axes["context"] * axes["tensor"]
    sizes = fit(ranks, **axes)
    if sequence and sizes["tensor"] == 1:
        raise LayoutError(f"layout {layout} cuts sequences over one tensor rank; leave sp out")
    for rank in range(ranks):
        yield _as_seen_by(rank, sizes, zero, sequence, torch.device(device))


def _as_seen_by(
    rank: int, sizes: dict[str, int], zero: int, sequence: bool, device: torch.device
) -> Mesh:
    index = index_of(rank, sizes)
    group = _groups(sizes, index)
    last = sizes["pipeline"] - 1
    ends = {}
    if last and index["pipeline"] in (0, last):
        both = _groups(
            {**sizes, "pipeline": 2}, {**index, "pipeline": int(index["pipeline"] == last)}
        )
        ends = {axes: both("pipeline", *axes) for axes in SUMS}
    return Mesh(
        cast(World, _World(rank, prod(sizes.values()), device)),
        sizes,
        index,
        data=group("data", "expert"),
        expert=group("expert"),
        pipeline=group("pipeline"),
        context=group("context"),
        tensor=group("tensor"),
        model=group("pipeline", "context", "tensor"),
        everyone=group(*AXES),
        sums={axes: group(*axes) for axes in SUMS},
        ends=ends,
        zero=zero,
        sequence=sequence,
    )


def _groups(sizes: dict[str, int], index: dict[str, int]) -> Callable[..., Group]:
    """Makes the group of ranks that differ along some axes alone; of the same ranks it is one."""
    made: dict[tuple[str, ...], Group] = {}

    def group(*axes: str) -> Group:
        several = tuple(axis for axis in AXES if axis in axes and sizes[axis] > 1)
        if several not in made:
            place = 0
            for axis in several:
                place = place * sizes[axis] + index[axis]
            size = prod(sizes[axis] for axis in several)
            made[several] = cast(Group, Imagined(place, size, several))
        return made[several]

    return group
