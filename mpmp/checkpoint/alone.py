"""The mesh of one process that has started no MPI: commands read and write checkpoints with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh


def alone(layout: str = "dp1.pp1.tp1") -> Mesh:
    """What this room asks of a mesh, for one rank; ``layout`` is written into manifests."""
    return cast("Mesh", SimpleNamespace(layout=layout, everyone=SimpleNamespace(rank=0, size=1)))


ALONE = alone()
