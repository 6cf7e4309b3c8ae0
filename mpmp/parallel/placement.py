"""Placement: the one description of a shard that every room reads.

Initial weights, reduction groups, the clip norm, verify, checkpoints and memory all ask a
parameter's placement and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a shard lies in the tensor that the whole model knows by ``name``.

    ``shape`` is the global shape, ``ranges`` the (start, stop) this rank holds of each dim.
    ``replicated`` are the axes of the mesh along which other ranks hold the very same elements and
    ``copy`` this rank's index on each of them; along those in ``summed`` the copies see different
    data, so that gradients are partial sums. ``shared_by`` lists the pipeline ranks that hold a
    copy (one, but for a tied embedding), and ``is_later`` is true on all but the first of them.
    """

    name: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    replicated: tuple[str, ...] = ()
    copy: tuple[int, ...] = ()
    summed: tuple[str, ...] = ()
    shared_by: tuple[int, ...] = ()
    is_later: bool = False

    @property
    def primary(self) -> bool:
        """Whether this is the copy that counts in a norm and is written to a file.

        True on exactly one rank of the world for each shard.
        """
        return self.counts(())

    def counts(self, pieces: Collection[str]) -> bool:
        """Whether this copy counts where each rank along ``pieces`` has a piece of the shard."""
        at = zip(self.replicated, self.copy, strict=True)
        return not self.is_later and not any(index for axis, index in at if axis not in pieces)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.ranges)

    @property
    def numel(self) -> int:
        return prod(self.local_shape)


def place(parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
    """Attach the placement to a parameter of the shard's shape."""
    assert tuple(parameter.shape) == placement.local_shape, (placement, tuple(parameter.shape))
    parameter.placement = placement  # type: ignore[attr-defined]
    return parameter


def placement_of(parameter: Tensor) -> Placement:
    """The placement that :func:`place` attached."""
    found = getattr(parameter, "placement", None)
    assert isinstance(found, Placement), "a parameter of mpmp always has a placement"
    return found


def placed_parameters(module: nn.Module) -> Iterator[tuple[Placement, nn.Parameter]]:
    """Every parameter of a module with its placement, each once, in the module's order."""
    for parameter in module.parameters():
        yield placement_of(parameter), parameter
