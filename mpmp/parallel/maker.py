"""The maker of parameters: every weight of a model is placed and filled here, by its global name.

A layer says what its whole weight looks like and along which dim it is cut; the maker knows where
this rank stands. Initial values come from counters, so every layout starts from the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpmp.comm.mesh import Mesh
from mpmp.parallel import counter
from mpmp.parallel.placement import Placement, place
from mpmp.programs.partition import partition


class Maker:
    """Makes the shards of one rank; ``stage`` groups of the mesh are read, never changed."""

    def __init__(self, mesh: Mesh, seed: int, dtype: torch.dtype) -> None:
        self.mesh, self.seed, self.dtype = mesh, seed, dtype
        self.device = mesh.world.device
        self.tensor = mesh.tensor

    def cut(self, length: int, unit: int = 1) -> tuple[int, int]:
        """This tensor rank's (start, stop) of a length that is cut in multiples of ``unit``."""
        assert length % unit == 0
        start, stop = partition(length // unit, self.tensor.size)[self.tensor.rank]
        return start * unit, stop * unit

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        std: float = 0.0,
        mean: float = 0.0,
        cut_dim: int | None = None,
        unit: int = 1,
        stages: tuple[int, ...] = (),
    ) -> nn.Parameter:
        """A parameter of global ``shape``, normal around ``mean``, cut along ``cut_dim`` if any.

        ``stages`` names the pipeline stages that hold a copy where there are several.
        """
        ranges = [(0, length) for length in shape]
        if cut_dim is not None:
            ranges[cut_dim] = self.cut(shape[cut_dim], unit)
        is_cut = cut_dim is not None and self.tensor.size > 1
        placement = Placement(
            name=name,
            shape=shape,
            ranges=tuple(ranges),
            replicated=("data",) if is_cut else ("data", "tensor"),
            shared_by=stages,
            primary=(is_cut or self.tensor.rank == 0)
            and (not stages or self.mesh.pipeline.rank == min(stages)),
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
