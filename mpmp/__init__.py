"""mpmp: language models whose parts live on different MPI ranks.

As a library::

    import mpmp

    mesh = mpmp.mesh(data=2, tensor=2)          # four ranks, two named axes
    total = mesh.tensor.allreduce(x, algorithm="ring")

Importing this package starts nothing: MPI (and torch) are imported when :func:`mesh` or
:func:`world` is called, so that a GPU can be chosen before and ``--help`` works without MPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpmp.comm.mesh import Mesh
    from mpmp.comm.world import World

__version__ = "0.1.0"
__all__ = ["mesh", "world"]


def world() -> World:
    """Start MPI (once) and return this rank's world: rank, size, host, threads, device."""
    from mpmp.comm.world import start

    return start()


def mesh(
    *,
    data: int | None = None,
    pipeline: int = 1,
    context: int = 1,
    tensor: int = 1,
    expert: int = 1,
) -> Mesh:
    """Arrange the ranks of the world on the named axes; an omitted data axis takes what is left.

    ``expert`` divides the data axis. Returns a mesh with a group of each axis: ``mesh.data``,
    ``mesh.expert``, ``mesh.pipeline``, ``mesh.context`` and ``mesh.tensor``.
    Raises LayoutError (on every rank alike) where the product is not the number of ranks.
    """
    from mpmp.comm.mesh import Mesh

    return Mesh.over(
        world(), data=data, pipeline=pipeline, context=context, tensor=tensor, expert=expert
    )
