"""A mesh of ranks that were never started: what each of them would hold, told in one process.

    for mesh in imagined("dp2.tp2.zero3"):      four meshes, one as each rank would see its own
        with torch.device("meta"):              shapes without memory
            models.build(..., mesh, ...)        what that rank would build

Its groups know ranks and sizes and give memory on the device ``meta``; none can move a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor

from mpmp.comm.group import Group
from mpmp.comm.mesh import SUMS, Mesh, fit, index_of
from mpmp.comm.world import World
from mpmp.config import AXES, parse_layout
from mpmp.errors import LayoutError


@dataclass(frozen=True, eq=False)
class _World:
    rank: int
    size: int
    device: torch.device


@dataclass(frozen=True, eq=False)
class _Group:
    """As much of a group as the building of models and shards asks."""

    rank: int
    size: int

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def prepare(self, collective: str, memory: Tensor) -> None:
        """Nothing that could be run."""


def imagined(layout: str) -> Iterator[Mesh]:
    """The mesh of a layout as each of its ranks would see it, rank 0 first."""
    axes = parse_layout(layout)
    zero, sequence = axes.pop("zero"), axes.pop("sequence")
    axes.setdefault("data", axes["expert"])
    ranks = axes["data"] * axes["pipeline"] * axes["context"] * axes["tensor"]
    sizes = fit(ranks, **axes)
    if sequence and sizes["tensor"] == 1:
        raise LayoutError(f"layout {layout} cuts sequences over one tensor rank; leave sp out")
    for rank in range(ranks):
        yield _as_seen_by(rank, sizes, zero, sequence)


def _as_seen_by(rank: int, sizes: dict[str, int], zero: int, sequence: bool) -> Mesh:
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
        cast(World, _World(rank, prod(sizes.values()), torch.device("meta"))),
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
            made[several] = cast(Group, _Group(place, prod(sizes[axis] for axis in several)))
        return made[several]

    return group
