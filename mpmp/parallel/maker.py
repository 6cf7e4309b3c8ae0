"""The maker of parameters: every weight of a model is placed and filled here, by its global name.

A layer says what its whole weight looks like and along which dims it is cut; the maker knows where
this rank stands. Initial values come from counters, so every layout starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mpmp.comm.mesh import Mesh
from mpmp.config import AXES
from mpmp.parallel import counter
from mpmp.parallel.deferred import Deferred
from mpmp.parallel.placement import Placement, place
from mpmp.programs.partition import partition

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Maker:
    """Makes the shards of one stage on one rank; groups of the mesh are read, never changed.

    ``sequence`` says that the ranks of a tensor group hold different pieces of each sequence
    between the cut layers (sequence parallelism), ``transient`` that weights are there only while
    their layer computes (ZeRO 3), ``compiled`` that blocks go through torch.compile. Stages of one
    rank that share a weight share ``deferred``, too.
    """

    def __init__(
        self,
        mesh: Mesh,
        seed: int,
        dtype: torch.dtype,
        *,
        sequence: bool = False,
        transient: bool = False,
        compiled: bool = False,
        deferred: Deferred | None = None,
    ) -> None:
        self.mesh, self.seed, self.dtype = mesh, seed, dtype
        self.device = mesh.world.device
        self.tensor, self.context, self.expert = mesh.tensor, mesh.context, mesh.expert
        self.sequence, self.transient = sequence and mesh.tensor.size > 1, transient
        self.compiled = compiled
        self.deferred = deferred or Deferred()

    def cut(self, length: int, unit: int = 1) -> tuple[int, int]:
        """This tensor rank's (start, stop) of a length that is cut in multiples of ``unit``."""
        assert length % unit == 0
        start, stop = partition(length // unit, self.tensor.size)[self.tensor.rank]
        return start * unit, stop * unit

    def outside(self, function: _Function) -> _Function:
        """``function``, which talks to other ranks, as one that no compiler looks into."""
        return torch.compiler.disable(function) if self.compiled else function  # type: ignore[no-untyped-call]

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        std: float = 0.0,
        mean: float = 0.0,
        cut_dim: int | None = None,
        unit: int = 1,
        own: tuple[int, int] | None = None,
        expert_dim: int | None = None,
        context_dim: int | None = None,
        apart: bool = False,
        stages: tuple[int, ...] = (),
    ) -> nn.Parameter:
        """A parameter of global ``shape``, normal around ``mean``, cut as its layer says.

        ``cut_dim`` is cut over the tensor axis in multiples of ``unit``, or as ``own`` has it;
        ``expert_dim`` over the expert axis, ``context_dim`` over the context axis. ``apart``: the
        ranks of the tensor group hold all of it and use it differently, each on its piece of the
        sequences, or each its own heads of it, so that gradients are partial sums. ``stages``:
        pipeline ranks that hold a copy where there are several.
        """
        ranges = [(0, length) for length in shape]
        cut_axes = {"pipeline"}
        if cut_dim is not None:
            ranges[cut_dim] = self.cut(shape[cut_dim], unit) if own is None else own
            cut_axes.add("tensor")
        if expert_dim is not None:
            ranges[expert_dim] = partition(shape[expert_dim], self.expert.size)[self.expert.rank]
            cut_axes.add("expert")
        if context_dim is not None:
            ranges[context_dim] = partition(shape[context_dim], self.context.size)[
                self.context.rank
            ]
            cut_axes.add("context")
        replicated = tuple(axis for axis in AXES if axis not in cut_axes)
        placement = Placement(
            name=name,
            shape=shape,
            ranges=tuple(ranges),
            replicated=replicated,
            copy=tuple(self.mesh.index[axis] for axis in replicated),
            summed=tuple(axis for axis in replicated if axis != "tensor" or apart),
            shared_by=stages,
            is_later=bool(stages) and self.mesh.pipeline.rank != min(stages),
        )
        return place(nn.Parameter(self._values(placement, mean, std)), placement)

    def _values(self, placement: Placement, mean: float, std: float) -> Tensor:
        if std == 0.0:
            values = torch.full(placement.local_shape, mean, dtype=torch.float64)
        else:
            index = counter.element_index(placement.shape, placement.ranges)
            key = counter.key_of(self.seed, placement.name)
            values = mean + std * counter.normal(key, index)
        return values.to(self.dtype).to(self.device)
